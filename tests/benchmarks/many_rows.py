"""The quickstart with more rows a task than ship, also under other system prompts.

    python -m tests.benchmarks.many_rows OUT [--rows 200] [--share turn]
    meteora run OUT/default.yaml      and none.yaml, long.yaml, longer.yaml, conversations.yaml
    python -m tests.benchmarks.many_rows OUT --read HOME

OUT gets the rows and five recipes with the same gates. Four ask single questions, under the system
prompts of `tests.benchmarks.prompts` with these names; one asks in conversations. The last command
prints what the fused model loses against the oracle in those that were run: single questions in
all, by task, and by whether a question begins with its numbers, which a causal gate reads before it
knows the task; and conversations, of which each is one row. OUT/tasks serves
`tests.benchmarks.parts`, too.
"""

import argparse
import re
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import Any

import yaml

from pipelines.data.row_sources import read_rows
from pipelines.evaluation.measurements import FUSED, ORACLE
from pipelines.workspace.context import RunContext
from tests.benchmarks.bigbench import SHIPPED
from tests.benchmarks.controls import recorded_values
from tests.benchmarks.paired import Pair, difference, mean_score
from tests.benchmarks.prompts import SYSTEMS
from tests.benchmarks.timing import table, tell
from tests.quickstart import make

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


def lines(out: Path, home: Path, name: str) -> Iterator[list[str]]:
    """What the recipe of this name shows to be lost; nothing if it was not run."""
    work = RunContext.open(str(out / f"{name}.yaml"), home)
    fused, oracle = recorded_values(work, FUSED), recorded_values(work, ORACLE)
    asked = {task: (fused[task], oracle[task]) for task in fused}

    def line(what: str, *pairs: Pair) -> list[str]:
        n = sum(len(ours) for ours, _ in pairs)
        means = [f"{mean_score(system):.3f}" for system in zip(*pairs, strict=True)]
        return [name, what, str(n), *means, difference(pairs)]

    if name == TALKS:
        yield from (line(task, pair) for task, pair in asked.items() if task not in make.TRAININGS)
        return
    if asked:
        yield line("**mean**", *asked.values())
    for task, pair in asked.items():
        yield line(task, pair)
        rows = read_rows(f"jsonl:tasks/{task}/test.jsonl", out, len(fused[task]))
        first = [bool(NUMBERS_FIRST.match(row.prompt)) for row in rows]
        others = [not one for one in first]
        if min(sum(first), sum(others)) >= LEAST:
            for what, kind in (("numbers first", first), ("others", others)):
                ours, right = ([*compress(values, kind)] for values in pair)
                yield line(f"{task}, {what}", (ours, right))


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
    if not found:
        parser.error(f"no recipe of {asked.out} was run in {asked.read}; run one, then read")
    names = ["recipe", "questions", "n", FUSED, ORACLE, "difference"]
    tell(table(names, found), "cpu")


if __name__ == "__main__":
    main()
