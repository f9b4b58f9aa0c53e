"""What gates are worth in other shapes of prompt than a single question: system prompts, turns.

    python -m tests.benchmarks.prompts BASE FOLDER OUT.json [--rows 30] [--conversations 40]

BASE is a folder with SmolLM2-135M-Instruct as safetensors, FOLDER one for files that are written
meanwhile. The experts are the quickstart's six. Every figure goes into OUT.json when it is there,
and is not made again; the table is printed at the end.

    prompt      gates fitted to single questions; the prompt decides for the template's opening
    shared      gates fitted to single questions, system prompts and conversations; tokens that say
                nothing about the task go to the mean of all experts
    shared, 2   the same with the two best experts of each token
    oracle      one question: the right expert for every token. Conversations: the right expert for
                every token of a turn, the mean of all for the others
"""

from __future__ import annotations

import argparse
import json
import random
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import one_hot

from meteora.artifacts import RouterOptions
from meteora.fitting.calibrate import calibrate
from meteora.model.fused import expert_names, force_expert, routed_by
from meteora.model.generate import answer_all
from meteora.routing.routers import Decision, Follower
from pipelines.data.conversations import (
    CONVERSATION_TURNS,
    SYSTEM_PROMPTS,
    Conversation,
    Turn,
    encode_conversation,
    in_every_shape,
)
from pipelines.data.labels import label_conversations
from pipelines.scoring.intervals import wilson
from pipelines.scoring.metrics import exact_match
from tests.benchmarks.gate_world import World
from tests.benchmarks.timing import machine
from tests.quickstart.make import TRAININGS

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.rows import Row

EXAMPLES = 64
LONGEST = 64
"""Tokens of an answer in a conversation."""
SYSTEMS = {
    "default": None,
    "none": "",
    "other": "You are Pip, a cheerful pirate assistant who loves the sea.",
}
TALKS = {"3 turns": (3, False), "3 turns of one task": (3, True), "10 turns": (10, False)}
FITS = {"prompt": 1, "shared": 1, "shared, 2": 2}
"""Experts of each token, by the name of the fit."""

Answer = list[list[int]]


class Asker:
    """A model with its gates, asked in every shape."""

    def __init__(self, world: World, model: PreTrainedModel) -> None:
        self.world, self.model = world, model
        self.tokenizer = world.tokenizer

    def singles(self, system: str | None, rows: int, *, forced: bool = False) -> list[list[float]]:
        """Exact match of each task's first test rows, under a system prompt.

        Args:
            forced: every token to the task's own expert
        """
        values = []
        for name in self.world.names:
            asked = self.world.tests[name][:rows]
            talks = [Conversation((Turn(name, row.prompt, ""),), system) for row in asked]
            prompts = [prompt_of(self.tokenizer, talk)[0] for talk in talks]
            longest = max(len(self.tokenizer(row.response).input_ids) for row in asked)
            if forced:
                with force_expert(self.model, name):
                    answers = answer_all(self.model, self.tokenizer, prompts, longest + 4)
            else:
                answers = answer_all(self.model, self.tokenizer, prompts, longest + 4)
            values += [[self._value(*pair)] for pair in zip(answers, asked, strict=True)]
        return values

    def _value(self, answer: list[int], row: Row) -> float:
        return exact_match(str(self.tokenizer.decode(answer, skip_special_tokens=True)), row)

    def conversations(
        self,
        talks: Sequence[Sequence[tuple[str, Row]]],
        answer: Callable[[list[Conversation]], Answer],
    ) -> list[list[float]]:
        """Exact match of each turn; the model's own answers stay in the history."""
        turns: list[list[Turn]] = [[] for _ in talks]
        values: list[list[float]] = [[] for _ in talks]
        for place in range(len(talks[0])):
            asked = [
                Conversation((*done, Turn(talk[place][0], talk[place][1].prompt, "")))
                for done, talk in zip(turns, talks, strict=True)
            ]
            for i, ids in enumerate(answer(asked)):
                name, row = talks[i][place]
                values[i].append(self._value(ids, row))
                text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() or "-"
                turns[i].append(Turn(name, row.prompt, text))
        return values

    def by_gates(self, asked: list[Conversation]) -> Answer:
        prompts = [prompt_of(self.tokenizer, one)[0] for one in asked]
        return answer_all(self.model, self.tokenizer, prompts, LONGEST)

    def by_oracle(self, asked: list[Conversation]) -> Answer:
        answers = []
        for one in asked:
            ids, owners = prompt_of(self.tokenizer, one)
            with self._owned(owners):
                answers += answer_all(self.model, self.tokenizer, [ids], LONGEST)
        return answers

    @contextmanager
    def _owned(self, owners: Sequence[str | None]) -> Generator[None]:
        """Every token of the prompt to its owner, those of nobody to the mean of all experts."""
        names, decision = expert_names(self.model), Decision()
        places = [len(names) - 1 if owner is None else names.index(owner) for owner in owners]

        def decide(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            length = kwargs.get("input_ids", args[0] if args else None).shape[1]
            chosen = torch.tensor(places if length > 1 else places[-1:])
            decision.hold(one_hot(chosen, len(names)).float())

        hook = self.model.base_model.register_forward_pre_hook(decide, with_kwargs=True)
        options = RouterOptions("oracle", 1, 1.0)
        try:
            with routed_by(self.model, lambda x: Follower(decision, x.num_choices, options)):
                yield
        finally:
            hook.remove()


def prompt_of(
    tokenizer: PreTrainedTokenizerBase, asked: Conversation
) -> tuple[list[int], list[str | None]]:
    """Token ids up to the last answer, and their owners."""
    ids, owners = encode_conversation(tokenizer, asked)  # the empty answer is its end alone
    return ids[:-1], owners[:-1]


def draw(world: World, turns: int, count: int, *, stays: bool) -> list[list[tuple[str, Row]]]:
    """Conversations of test rows whose task changes at each turn, or never does."""
    rng = random.Random(f"{turns}/{stays}")
    talks = []
    for _ in range(count):
        names = [rng.choice(world.names)]
        while len(names) < turns:
            others = [name for name in world.names if name != names[-1]]
            names.append(names[-1] if stays else rng.choice(others))
        talks.append([(name, rng.choice(world.tests[name])) for name in names])
    return talks


def fitted(world: World, fit: str) -> PreTrainedModel:
    """The model with gates of this fit."""
    options = RouterOptions("gate", FITS[fit], 1.0, share="point")
    if fit == "prompt":
        model = world.model()
        calibrate(model, world.sequences(EXAMPLES), options, template=world.template)
        return model
    model = world.model(opening="shared")
    examples = {name: world.examples[name][:EXAMPLES] for name in world.names}
    talks = in_every_shape(examples, world.names, CONVERSATION_TURNS, SYSTEM_PROMPTS, seed=0)
    nobody = len(world.names)
    calibrate(model, label_conversations(talks, world.names, world.tokenizer, nobody), options)
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
            flat = [value for one in values for value in one]
            count = len(flat)
            low, high = wilson(int(sum(flat)), count)
            cell = f"{sum(flat) / count:.3f} [{low:.2f}, {high:.2f}]"
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
    talks = {
        shape: draw(world, turns, max(2, args.conversations * 3 // turns), stays=stays)
        for shape, (turns, stays) in TALKS.items()
    }

    def keep(system: str, shape: str, make: Callable[[], list[list[float]]]) -> None:
        row = found.setdefault(system, {})
        if shape not in row:
            row[shape] = make()
            args.out.write_text(json.dumps(found))

    for fit in args.fits:
        asker = Asker(world, fitted(world, fit))
        for shape, system in SYSTEMS.items():
            name = f"one question, system prompt: {shape}"
            keep(fit, name, partial(asker.singles, system, args.rows))
            if fit == "shared":
                keep("oracle", name, partial(asker.singles, system, args.rows, forced=True))
        for shape, drawn in talks.items():
            keep(fit, shape, partial(asker.conversations, drawn, asker.by_gates))
            if fit == "shared":
                keep("oracle", shape, partial(asker.conversations, drawn, asker.by_oracle))
    print(f"{machine()}; {EXAMPLES} examples an expert\n")
    print_table(found)


if __name__ == "__main__":
    main()
