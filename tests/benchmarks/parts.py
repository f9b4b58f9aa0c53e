"""Which part of a prompt the default gates lose by: one part gets the right expert by hand.

    python -m tests.benchmarks.parts CHECKPOINT TASKS [--rows 60] [--system long]
    python -m tests.benchmarks.parts CHECKPOINT TASKS --turns 10 [--conversations 60]

CHECKPOINT has gates by which each token decides for itself, and TASKS a `NAME/test.jsonl` of each
of its experts. The parts are the opening of the chat template or the text between two turns, the
first two tokens of the question, the rest of it, its closing, and the answer. All parts but the
named ones are left to the gates. `--system` asks under one of the system prompts of
`tests.benchmarks.prompts`, which is then part of the opening. `--turns` asks conversations of so
many turns, each about another task. The second table has the routes with nothing by hand.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import meteora
from meteora.artifacts import SHARED
from meteora.base.chat_template import Template
from meteora.model.generate import end_tokens
from meteora.routing.layer import routed_layers
from meteora.routing.passes import PassInput, Present, Watcher
from meteora.routing.routers import Gate
from meteora.routing.turns import questions
from pipelines.data.composites import Question
from pipelines.data.dialogues import Dialogue, draw_dialogues
from pipelines.data.row_sources import read_rows
from pipelines.evaluation import measurements
from pipelines.evaluation.conversations import Conversing, Prompt, TurnCache
from pipelines.scoring.metrics import exact_match
from tests.benchmarks.paired import difference, mean_score
from tests.benchmarks.prompts import BATCH_SIZE, SYSTEMS
from tests.benchmarks.timing import table, tell

PARTS = ("opening", "first two tokens", "rest of the question", "closing", "answer")
OPENING, FIRST, REST, CLOSING, ANSWER = range(len(PARTS))
TURN = (FIRST, REST, CLOSING, ANSWER)
FORCED = {
    "none": (),
    "none; no offsets": (),
    "answer": (ANSWER,),
    "first two tokens": (FIRST,),
    "question": (FIRST, REST),
    "question, closing, answer": TURN,
    "question, closing, answer; no offsets": TURN,
    "opening; no offsets": (OPENING,),
}
"""Where the right expert is forced; the first is the model as it is. Offsets make up for an opening
by all experts, and are left out where the right one has it."""
ORACLE = "all; no offsets"
MAX_NEW_TOKENS = 24


class Parts(Watcher):
    """The part of each token in the present pass, and what is forced there."""

    def __init__(self, template: Template, shared: int, ends: Sequence[int]) -> None:
        """Take the number of the choice that is the mean of all experts, and what ends answers."""
        self.template, self.shared, self.now = template, shared, Present()
        self.ends = torch.tensor(ends)
        self.forced: tuple[int, ...] = ()
        self.experts = self.before = torch.zeros(0, dtype=torch.long)
        """[B] the right expert of each conversation's turn, and that of the turn before."""
        self.part = torch.zeros(0, 0, dtype=torch.long)
        """[B, L]; -1 for padding, and behind the end of an answer"""
        self.went: Counter[tuple[int, str]] = Counter()
        """Routes by part and by whose expert they chose."""

    def see(self, seen: PassInput) -> None:
        self.part = torch.full(seen.is_token.shape, ANSWER)
        if seen.is_token.shape[1] > 1:
            asked = questions(seen, self.template).asked
            place = asked.cumsum(1)
            self.part = (place > 0) * CLOSING  # not begun: the opening
            self.part[asked] = torch.where(place[asked] > 2, REST, FIRST)
        elif seen.ids is not None:  # a batch goes on until its last answer ends
            self.part[torch.isin(seen.ids, self.ends)] = -1
        self.part[~seen.is_token] = -1

    def decide(self, logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """A gate's own logits [T, C], or those of the right expert."""
        logits, part = logits_of(tokens), self.part.flatten()
        right, before = (
            own[:, None].expand_as(self.part).flatten() for own in (self.experts, self.before)
        )
        chosen = logits.argmax(1)
        whose = {"right": chosen == right, "all": chosen == self.shared, "before": chosen == before}
        for number in range(len(PARTS)):
            for name, is_so in whose.items():
                self.went[number, name] += int((is_so & (part == number)).sum())
            self.went[number, ""] += int((part == number).sum())
        is_forced = torch.isin(part, torch.tensor(self.forced))[:, None]
        by_hand = torch.full_like(logits, -torch.inf).scatter_(1, right[:, None], 0.0)
        return torch.where(is_forced, by_hand, logits)


@dataclass(eq=False)
class PartsConversing(Conversing):
    """Tells the parts whose turn it is."""

    parts: Parts | None = None
    names: Sequence[str] = ()

    def _answer(self, prompts: Sequence[Prompt], cache: TurnCache) -> list[dict[str, object]]:
        if self.parts is not None:
            own = torch.tensor([self.names.index(one.experts[-1]) for one in prompts])
            is_later = any(cache.ids)
            self.parts.before = self.parts.experts if is_later else torch.full_like(own, -1)
            self.parts.experts = own
        return super()._answer(prompts, cache)


def asked_of(
    names: Sequence[str], tasks: Path, rows: int, turns: int, count: int, system: str | None
) -> list[list[Dialogue]]:
    """The dialogues of each task, or `count` of all tasks together."""
    found = {name: read_rows(f"jsonl:{name}/test.jsonl", tasks, rows) for name in names}
    if turns > 1:
        return [draw_dialogues(found, turns, count, seed=0, system=system)]
    return [
        [Dialogue((Question(name, row),), system) for row in own] for name, own in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--conversations", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=FORCED, default=list(FORCED))
    parser.add_argument("--system", choices=SYSTEMS, default="default")
    asked = parser.parse_args()
    model, tokenizer = meteora.load(asked.checkpoint)
    choices = meteora.expert_names(model)
    names = [name for name in choices if (asked.tasks / name).is_dir()]
    if not names:
        parser.error(f"{asked.tasks} has no folder of any expert's name")
    ends = end_tokens(model, tokenizer)
    shared = choices.index(SHARED) if SHARED in choices else len(choices)
    parts = Parts(Template.of(tokenizer), shared, ends)
    routers = [layer.router for layer in routed_layers(model).values() if layer.router]
    for router in routers:
        if isinstance(router, Gate):
            router.by_question = parts
    offsets = [router.offsets for router in routers]
    system = SYSTEMS[asked.system]
    groups = asked_of(names, asked.tasks, asked.rows, asked.turns, asked.conversations, system)

    def values(control: str) -> list[list[float]]:
        """The mean of each dialogue's turns, by group."""
        conversing = PartsConversing(
            model,
            tokenizer,
            MAX_NEW_TOKENS,
            BATCH_SIZE,
            control,
            parts=None if control else parts,
            names=choices,
        )
        return [
            [
                sum(
                    exact_match(turn["output"], question.row)
                    for turn, question in zip(turns, dialogue.questions, strict=True)
                )
                / len(turns)
                for turns, dialogue in zip(conversing.ask(group), group, strict=True)
            ]
            for group in groups
        ]

    found = {ORACLE: values(measurements.ORACLE)}
    parts.watch(model)
    for what in asked.only:
        parts.forced = FORCED[what]
        for router, own in zip(routers, offsets, strict=True):
            router.offsets = None if "no offsets" in what else own
        parts.went.clear()
        found[what] = values("")
        if what == "none":
            routes = parts.went.copy()
        print(f"{what}: done", flush=True)
    lines = [
        [what, f"{mean_score(own):.3f}", difference([*zip(own, found[ORACLE], strict=True)])]
        for what, own in found.items()
        if what != ORACLE
    ]
    lines.insert(0, [ORACLE, f"{mean_score(found[ORACLE]):.3f}", ""])
    text = table(["right by hand", "mean", "against all"], lines)
    if "none" in asked.only:
        whose = ("right", "before", "all")
        shares = [
            [part, *(f"{routes[i, name] / max(routes[i, ''], 1):.3f}" for name in whose)]
            for i, part in enumerate(PARTS)
        ]
        columns = ["part", "its own expert", "the turn before's", "all experts"]
        text += "\n\n" + table(columns, shares)
    number = f"{asked.rows} rows each"
    if asked.turns > 1:
        number = f"{asked.conversations} conversations of {asked.turns} turns"
    tell(f"{len(names)} tasks, {number}\n\n{text}", "cpu")


if __name__ == "__main__":
    main()
