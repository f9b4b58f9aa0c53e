"""Where the tokens of composites go, with the right answers given, and what wrong routes cost.

    python -m tests.benchmarks.list_routes TASKS CHECKPOINT
        [--questions 10] [--num-fewshot 0] [--prompts 16] [--base FOLDER]

TASKS has a `NAME/test.jsonl` of each expert, such as the folder `tasks` that
`tests.benchmarks.lists` leaves; CHECKPOINT has gates by which each token decides for itself; FOLDER
is needed if its base is a folder. The first table has the share of modules that choose a token's
own expert, in the lower and in the upper half of the layers: for the prompt, the digits of the
numbers in front of answers, what stands between digits and answer, the first token of an answer,
and its other tokens. The second has the log-likelihood of the right answers where some of these
tokens get the right expert by hand.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import meteora
from meteora.artifacts import SHARED
from meteora.base.chat_template import Template, encode_prompt
from meteora.model.fused import expert_names
from meteora.routing.gates import gates_in
from pipelines.data.composites import compose
from pipelines.data.row_sources import read_rows
from tests.benchmarks.rejoin import chosen
from tests.benchmarks.timing import table
from tests.quickstart.make import TRAININGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.composites import Composite

NUM_ROWS = 240
TEMPLATE, PROMPT, DIGITS, BEHIND, FIRST, OTHER = PARTS = (
    "template",
    "prompt",
    "digits of numbers",
    "between digits and answer",
    "first tokens of answers",
    "other tokens of answers",
)
BEGINNINGS = (DIGITS, BEHIND, FIRST)
RIGHT: dict[str, tuple[tuple[str, ...], float]] = {
    "nowhere": ((), 0.0),
    "prompt": ((PROMPT,), 0.0),
    "numbers and first tokens": (BEGINNINGS, 0.0),
    "the same, upper half of the layers": (BEGINNINGS, 0.5),
    "everywhere": (PARTS, 0.0),
}
"""Where the right expert is forced: at which tokens, and from which share of the layers on."""


@dataclass
class Asked:
    """A composite with its answers."""

    ids: list[int]
    experts: Tensor
    """[L] the right choice of each token"""
    parts: list[str]
    """Of each token."""
    answer: int
    """Where the answers begin."""

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, composite: Composite, names: tuple[str, ...]
    ) -> Asked:
        ids, owners = composite.encode(tokenizer)
        digits = {*composite.answer_starts(tokenizer, "{}")}
        numbers = {*composite.answer_starts(tokenizer)}
        answer = len(encode_prompt(tokenizer, composite.prompt))

        def part(place: int, owner: str | None) -> str:
            if owner is None:
                return TEMPLATE
            if place < answer:
                return PROMPT
            if place in numbers:
                return DIGITS if place in digits else BEHIND
            return FIRST if place - 1 in numbers else OTHER

        parts = [part(place, owner) for place, owner in enumerate(owners)]
        right = [names.index(SHARED if owner is None else owner) for owner in owners]
        return cls(ids, torch.tensor(right), parts, answer)


class Forced:
    """A gate's own logits, but those of the right expert at some tokens."""

    def __init__(self) -> None:
        self.template = Template()
        self.right = torch.zeros(0, dtype=torch.long)
        self.where = torch.zeros(0, dtype=torch.bool)

    def decide(self, logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        logits = logits_of(tokens)
        right = torch.full_like(logits, -torch.inf).scatter_(1, self.right[:, None], 0.0)
        return torch.where(self.where[:, None], right, logits)


def shares(model: PreTrainedModel, composites: list[Asked]) -> dict[str, list[Tensor]]:
    """By part, of each token [M] whether each module, in the order of calls, chose rightly."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    for asked in composites:
        right = (chosen(model, asked.ids) == asked.experts).float()
        for place, part in enumerate(asked.parts):
            found[part].append(right[:, place])
    return found


def nats(
    model: PreTrainedModel, composites: list[Asked], parts: tuple[str, ...], above: float
) -> float:
    """The mean cost of a composite's right answers, in nats."""
    gates = gates_in(model)
    total = 0.0
    for asked in composites:
        where = torch.tensor([part in parts for part in asked.parts])
        for place, gate in enumerate(gates.values()):
            forced = Forced()
            forced.right, forced.where = asked.experts, where & (place >= above * len(gates))
            gate.by_question = forced
        logits = model(torch.tensor([asked.ids])).logits[0, asked.answer - 1 : -1]
        answers = torch.tensor(asked.ids[asked.answer :])
        total += float(torch.nn.functional.cross_entropy(logits, answers, reduction="sum"))
    for gate in gates.values():
        gate.by_question = None
    return total / len(composites)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("tasks", "checkpoint"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--num-fewshot", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--base", type=Path)
    asked = parser.parse_args()
    model, tokenizer = meteora.load(asked.checkpoint, base_folder=asked.base)
    names = expert_names(model)
    folder = asked.tasks.absolute()
    rows = {n: read_rows(f"jsonl:{folder / n}/test.jsonl", Path(), NUM_ROWS) for n in TRAININGS}
    composites = [
        Asked.of(tokenizer, composite, tuple(names))
        for composite in compose(rows, asked.questions, asked.prompts, 0, asked.num_fewshot)
    ]
    found = shares(model, composites)
    lines = []
    for part in PARTS:
        right = torch.stack(found[part])
        halves = (half.mean().item() for half in (right, *right.chunk(2, dim=1)))
        lines.append([part, len(right), *(f"{share:.3f}" for share in halves)])
    print(table(["tokens", "n", "to their expert", "lower half", "upper half"], lines))
    costs = [[what, f"{nats(model, composites, *where):.1f}"] for what, where in RIGHT.items()]
    print(table(["right expert by hand", "nats a composite"], costs))


if __name__ == "__main__":
    main()
