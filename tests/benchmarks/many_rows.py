"""The quickstart with more rows a task than ship, also under other system prompts.

    python -m tests.benchmarks.many_rows OUT [--rows 200] [--share turn]
    meteora run OUT/default.yaml      and none.yaml, long.yaml, longer.yaml, conversations.yaml
    python -m tests.benchmarks.many_rows OUT --read HOME

OUT gets the rows and five recipes with the same gates. Four ask single questions, under the system
prompts of `tests.benchmarks.prompts` with these names; one asks in conversations. The last command
prints what the fused model loses against the oracle: single questions in all, by task, and by
whether a question begins with its numbers, which a causal gate reads before it knows the task; and
conversations, of which each is one row. OUT/tasks serves `tests.benchmarks.parts`, too.
"""

from __future__ import annotations

import argparse
import re
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.data.row_sources import read_rows
from pipelines.evaluation.measurements import FUSED, ORACLE
from pipelines.scoring.intervals import difference_interval, mean_difference
from pipelines.workspace.context import RunContext
from tests.benchmarks.bigbench import SHIPPED
from tests.benchmarks.controls import recorded_values
from tests.benchmarks.prompts import SYSTEMS
from tests.benchmarks.timing import table, tell
from tests.quickstart import make

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ASKED_UNDER = ("default", "none", "long", "longer")
TALKS = "conversations"
CONVERSATIONS = [{"n": 3, "count": 100}, {"n": 10, "count": 40}]
NUMBERS_FIRST = re.compile(r"(What is )?\d")
"""How a question begins that does not tell its task at once."""
LEAST = 30
"""Fewer questions of a kind are not shown apart."""


def sections(rows: int) -> dict[str, dict[str, Any]]:
    """The section `benchmark` of each recipe, by the recipe's name."""
    common = {"limit": rows, "compare": [ORACLE], "batch_size": 100}
    asked = {name: {**common, "system_prompt": SYSTEMS[name]} for name in ASKED_UNDER}
    del asked["default"]["system_prompt"]  # the template's own
    return {**asked, TALKS: {**common, "limit": 4, "conversation": CONVERSATIONS}}


def write(out: Path, rows: int, share: str) -> None:
    """Write rows and recipes."""
    for task in make.TRAININGS:
        make.write_splits(task, out, make.seen_in_training(task), rows)
    body = yaml.safe_load((SHIPPED / "recipe.yaml").read_text())
    body["router"]["share"] = share
    for expert in body["experts"]:
        expert["adapter"] = f"path:{SHIPPED / 'adapters' / expert['name']}"
    for name, benchmark in sections(rows).items():
        recipe = yaml.safe_dump({**body, "benchmark": benchmark}, sort_keys=False)
        (out / f"{name}.yaml").write_text(recipe)


def is_graded(*values: Sequence[float]) -> bool:
    """Whether a row may be partly right, as a conversation may."""
    return not {value for row in values for value in row} <= {0.0, 1.0}


def lines(out: Path, home: Path, name: str) -> Iterator[list[str]]:
    """What the recipe of this name shows to be lost."""
    work = RunContext.open(str(out / f"{name}.yaml"), home)
    fused, oracle = recorded_values(work, FUSED), recorded_values(work, ORACLE)

    def line(what: str, parts: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[str]:
        means = [(sum(ours) / len(ours), sum(right) / len(right)) for ours, right in parts]
        apart = [
            (mean - right_mean, *difference_interval(ours, right, graded=is_graded(ours, right)))
            for (mean, right_mean), (ours, right) in zip(means, parts, strict=True)
        ]
        difference, low, high = mean_difference(apart)
        n = sum(len(ours) for ours, _ in parts)
        mean, right_mean = (sum(column) / len(parts) for column in zip(*means, strict=True))
        scores = [f"{right_mean:.3f}", f"{mean:.3f}"]
        return [name, what, str(n), *scores, f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"]

    if name == TALKS:
        talks = [task for task in fused if task not in make.TRAININGS]
        yield from (line(task, [(fused[task], oracle[task])]) for task in talks)
        return
    yield line("**mean**", [(fused[task], oracle[task]) for task in fused])
    for task in fused:
        yield line(task, [(fused[task], oracle[task])])
        rows = read_rows(f"jsonl:tasks/{task}/test.jsonl", out, len(fused[task]))
        first = [bool(NUMBERS_FIRST.match(row.prompt)) for row in rows]
        others = [not one for one in first]
        if min(sum(first), sum(others)) >= LEAST:
            for what, kind in (("numbers first", first), ("others", others)):
                both = [*compress(fused[task], kind)], [*compress(oracle[task], kind)]
                yield line(f"{task}, {what}", [both])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=200, help="rows a task")
    parser.add_argument("--share", choices=["point", "turn"], default="point")
    parser.add_argument("--read", type=Path, metavar="HOME", help="the store of the runs")
    asked = parser.parse_args()
    if asked.read is None:
        write(asked.out, asked.rows, asked.share)
        return
    found = [line for name in (*ASKED_UNDER, TALKS) for line in lines(asked.out, asked.read, name)]
    names = ["recipe", "questions", "n", ORACLE, FUSED, "difference"]
    tell(table(names, found), "cpu")


if __name__ == "__main__":
    main()
