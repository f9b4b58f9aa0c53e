"""Which part of a prompt the default gates lose by: one part gets the right expert by hand.

    python -m tests.benchmarks.parts CHECKPOINT TASKS [--rows 60] [--system long]

CHECKPOINT has gates by which each token decides for itself, and TASKS a `NAME/test.jsonl` of each
of its experts. The parts are the opening of the chat template, the question, its closing, and the
answer. All parts but the named ones are left to the gates. `--system` asks under one of the system
prompts of `tests.benchmarks.prompts`, which is then part of the opening.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import meteora
from meteora.base.chat_template import Template, encode_messages
from meteora.model.generate import answer_all
from meteora.routing.layer import routed_layers
from meteora.routing.passes import PassInput, Present, Watcher
from meteora.routing.routers import Gate
from meteora.routing.turns import questions
from pipelines.data.row_sources import read_rows
from pipelines.scoring.metrics import exact_match
from tests.benchmarks.paired import difference, mean_score
from tests.benchmarks.prompts import SYSTEMS
from tests.benchmarks.timing import table, tell

OPENING, QUESTION, CLOSING, ANSWER = PARTS = (0, 1, 2, 3)
FORCED = {
    "none": (),
    "none; no offsets": (),
    "answer": (ANSWER,),
    "question": (QUESTION,),
    "question, closing, answer": (QUESTION, CLOSING, ANSWER),
    "question, closing, answer; no offsets": (QUESTION, CLOSING, ANSWER),
    "opening; no offsets": (OPENING,),
    "all; no offsets": PARTS,
}
"""Where the right expert is forced; the first is the model as it is, the last the oracle. Offsets
make up for an opening by all experts, and are left out where the right one has it."""
ORACLE = "all; no offsets"
MAX_NEW_TOKENS = 24


class Parts(Watcher):
    """The part of each token in the present pass, and what is forced there."""

    def __init__(self, template: Template) -> None:
        self.template, self.now = template, Present()
        self.forced: tuple[int, ...] = ()
        self.expert = 0
        self.is_forced = torch.zeros(0, dtype=torch.bool)
        """[T]"""

    def see(self, seen: PassInput) -> None:
        part = torch.full_like(seen.is_token, ANSWER, dtype=torch.long)
        if not seen.goes_on:
            asked = questions(seen, self.template).asked
            begun = asked.cumsum(1) > 0
            part = begun * CLOSING  # not begun: the opening
            part[asked] = QUESTION
        self.is_forced = torch.isin(part, torch.tensor(self.forced)).flatten()

    def decide(self, logits_of: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """A gate's own logits [T, C], or those of the right expert."""
        logits = logits_of(tokens)
        right = torch.full_like(logits[0], -torch.inf)
        right[self.expert] = 0.0
        return torch.where(self.is_forced[:, None], right, logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=FORCED, default=list(FORCED))
    parser.add_argument("--system", choices=SYSTEMS, default="default")
    asked = parser.parse_args()
    system = SYSTEMS[asked.system]
    before = [] if system is None else [{"role": "system", "content": system}]
    model, tokenizer = meteora.load(asked.checkpoint)
    parts = Parts(Template.of(tokenizer))
    parts.watch(model)
    for layer in routed_layers(model).values():
        if isinstance(layer.router, Gate):
            layer.router.by_question = parts
    routers = [layer.router for layer in routed_layers(model).values() if layer.router]
    offsets = [router.offsets for router in routers]
    names = [name for name in meteora.expert_names(model) if (asked.tasks / name).is_dir()]
    if not names:
        parser.error(f"{asked.tasks} has no folder of any expert's name")
    values: dict[str, list[list[float]]] = {}
    for what in dict.fromkeys([ORACLE, *asked.only]):
        parts.forced = FORCED[what]
        for router, own in zip(routers, offsets, strict=True):
            router.offsets = None if "no offsets" in what else own
        for name in names:
            parts.expert = meteora.expert_names(model).index(name)
            rows = read_rows(f"jsonl:{name}/test.jsonl", asked.tasks, asked.rows)
            prompts = [
                encode_messages(tokenizer, [*before, {"role": "user", "content": row.prompt}])
                for row in rows
            ]
            answers = tokenizer.batch_decode(
                answer_all(model, tokenizer, prompts, MAX_NEW_TOKENS), skip_special_tokens=True
            )
            found = [exact_match(said, row) for said, row in zip(answers, rows, strict=True)]
            values.setdefault(what, []).append(found)
        print(f"{what}: done", flush=True)
    lines = [
        [what, f"{mean_score(found):.3f}", difference([*zip(found, values[ORACLE], strict=True)])]
        for what, found in values.items()
    ]
    text = table(["right by hand", "mean", "against all"], lines)
    tell(f"{len(names)} tasks, {asked.rows} rows each\n\n{text}", "cpu")


if __name__ == "__main__":
    main()
