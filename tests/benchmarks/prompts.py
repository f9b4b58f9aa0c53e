"""What gates are worth in other shapes of prompt than a single question: system prompts, turns.

    python -m tests.benchmarks.prompts BASE FOLDER OUT.json [--rows 30] [--conversations 40]

BASE is a folder with SmolLM2-135M-Instruct as safetensors, FOLDER one for files that are written
meanwhile. The experts are the quickstart's six. Every figure goes into OUT.json when it is there,
and is not made again; the table is printed at the end.

    prompt      gates fitted to single questions; the prompt decides for the template's opening
    shared      gates fitted to single questions, system prompts and conversations; tokens that say
                nothing about the task go to the mean of all experts
    shared, 2   the same with the two best experts of each token
    turn        gates fitted to the same; each question decides for its turn
    oracle      the right expert for every token; what stands in front of a turn has the turn's
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from meteora.artifacts import RouterOptions
from meteora.fitting.calibrate import calibrate
from pipelines.data.composites import Question
from pipelines.data.dialogues import Dialogue, draw_dialogues
from pipelines.evaluation.conversations import Conversing
from pipelines.scoring.intervals import are_graded, interval_of_mean
from pipelines.scoring.metrics import exact_match
from tests.benchmarks.gate_world import World
from tests.benchmarks.timing import machine
from tests.quickstart.make import TRAININGS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

EXAMPLES = 64
LONGEST = 64
"""Tokens of an answer."""
BATCH_SIZE = 16
SYSTEMS = {
    "default": None,
    "none": "",
    "other": "You are Pip, a cheerful pirate assistant who loves the sea.",
    "short": "Hi.",
    "long": (
        "You work for a small publisher of travel books. The team is three people: Amara edits,"
        " Jonas, who draws the maps, and Lucía, who talks to the shops. Everything that you write"
        " is read by all of them, so keep a friendly tone, use British spelling, and do not shorten"
        " the names of countries. If a request is unclear, take the reading that a traveller would"
        " take. Never promise a date of publication. Prices are in euros. When somebody asks about"
        " a place that is dangerous, point to the official advice for travellers. Do not give legal"
        " or medical advice. If you are asked who you are, you are the publisher's assistant."
    ),
    "longer": Path(__file__).with_name("long_system_prompt.txt").read_text("utf-8").strip(),
    "in Portuguese": "Você é um assistente paciente que gosta de música e de futebol.",
    "about dates": "You turn dates into the ISO format. Always answer with a date: YYYY-MM-DD.",
}
"""None of them is among those that gates are fitted to, but for "none" and the template's own."""
FITS = {
    "prompt": RouterOptions("gate", 1, 1.0, share="point"),
    "shared": RouterOptions("gate", 1, 1.0, share="point", opening="shared"),
    "shared, 2": RouterOptions("gate", 2, 1.0, share="point", opening="shared"),
    "turn": RouterOptions("gate", 1, 1.0, share="turn"),
}
"""How the model routes, by the name of the fit."""


def shapes(world: World, rows: int, conversations: int) -> dict[str, list[Dialogue]]:
    """What is asked: single questions under each system prompt, and conversations."""
    found = {
        f"one question, system prompt: {shape}": [
            Dialogue((Question(name, row),), system)
            for name in world.names
            for row in world.tests[name][:rows]
        ]
        for shape, system in SYSTEMS.items()
    }
    found["3 turns"] = draw_dialogues(world.tests, 3, conversations, seed=0)
    each = -(-conversations // len(world.names))
    found["3 turns of one task"] = [
        dialogue
        for name in world.names
        for dialogue in draw_dialogues({name: world.tests[name]}, 3, each, seed=0)
    ]
    found["10 turns"] = draw_dialogues(world.tests, 10, max(2, conversations * 3 // 10), seed=0)
    return found


def values(
    world: World, model: PreTrainedModel, dialogues: Sequence[Dialogue], control: str
) -> list[list[float]]:
    """Exact match of each turn; the model's own answers stay in the history."""
    asked = Conversing(
        model, world.tokenizer, max_new_tokens=LONGEST, batch_size=BATCH_SIZE, control=control
    )
    return [
        [
            exact_match(turn["output"], question.row)
            for turn, question in zip(turns, dialogue.questions, strict=True)
        ]
        for turns, dialogue in zip(asked.ask(dialogues), dialogues, strict=True)
    ]


def fitted(world: World, fit: str) -> PreTrainedModel:
    """The model with gates of this fit."""
    options = FITS[fit]
    model = world.model(opening=options.opening)
    if fit == "prompt":
        calibrate(model, world.sequences(EXAMPLES), options, template=world.template)
        return model
    shared = options.opening == "shared"
    labelled = world.conversations(EXAMPLES, shared=shared)
    calibrate(model, labelled, options, template=None if shared else world.template)
    return model


def print_table(found: dict[str, dict[str, list[list[float]]]]) -> None:
    """A line a shape, a column a system; means with their 95 % intervals, and means by turn."""
    print("| shape | n | " + " | ".join(found) + " |\n|-|-|" + "-|" * len(found))
    shapes = dict.fromkeys(shape for row in found.values() for shape in row)
    for shape in shapes:
        cells, count = [], 0
        for row in found.values():
            values = row.get(shape)
            if values is None:
                cells.append("")
                continue
            rows = [fmean(one) for one in values]  # turns of one conversation depend on each other
            count = sum(map(len, values))
            _, low, high = interval_of_mean(rows, graded=are_graded(rows))
            cell = f"{fmean(rows):.3f} [{low:.2f}, {high:.2f}]"
            if len(values[0]) > 1:
                by_turn = [sum(turn) / len(turn) for turn in zip(*values, strict=True)]
                cell += " (" + " ".join(f"{mean:.2f}" for mean in by_turn) + ")"
            cells.append(cell)
        print(f"| {shape} | {count} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--fits", nargs="+", choices=FITS, default=list(FITS))
    args = parser.parse_args()
    world = World.open(args.base, args.folder, list(TRAININGS), args.rows)
    found: dict[str, dict[str, list[list[float]]]] = (
        json.loads(args.out.read_text()) if args.out.exists() else {}
    )
    asked = shapes(world, args.rows, args.conversations)

    def keep(system: str, shape: str, make: Callable[[], list[list[float]]]) -> None:
        row = found.setdefault(system, {})
        if shape not in row:
            row[shape] = make()
            args.out.write_text(json.dumps(found))

    for fit in args.fits:
        model = fitted(world, fit)
        for shape, dialogues in asked.items():
            keep(fit, shape, partial(values, world, model, dialogues, ""))
            control = "oracle" if len(dialogues[0].questions) > 1 else "single"
            keep("oracle", shape, partial(values, world, model, dialogues, control))
    print(f"{machine()}; {EXAMPLES} examples an expert\n")
    print_table(found)


if __name__ == "__main__":
    main()
