"""Rows that are both examples and tests: refused, or left out of an import's examples.

Rows that are examples of several experts are allowed, since adapters may have learnt one task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from meteora.untrusted.findings import MOST_NAMED, counted, listed
from pipelines.data.row_sources import json_lines, read_rows, row_place
from pipelines.data.rows import Row, refuse_overlap
from pipelines.data.spans import prompt_parts
from pipelines.recipe.recipe import AUTO
from pipelines.workspace.console import say

if TYPE_CHECKING:
    from pipelines.data.spans import SpannedRow, SpannedTurns
    from pipelines.recipe.from_folder import Found
    from pipelines.workspace.context import RunContext

ALL_ROWS = 1_000_000


def separate(adapters: Sequence[Found], out: Path, *, drop: bool) -> list[Found]:
    """The adapters of an import; no example of any of them is a test row of any of them.

    Prints the refused adapters; their rows do not count.

    Args:
        out: The folder for files of examples with rows left out; nothing is written here.
        drop: Leave out examples that are also test rows, in place of an error.

    Raises:
        ExamplesError: Without `drop`, a row is both. Or rows cannot be read.
    """
    for one in adapters:
        if one.refusal:
            say(f"{one.folder}: {one.refusal}", "left out")
    paths = {one.name: one for one in adapters if not one.refusal}
    examples = {name: _read(one.examples) for name, one in paths.items() if one.examples}
    tests = {name: _read(one.test) for name, one in paths.items() if one.test}
    if not drop:
        refuse_overlap(
            examples,
            tests,
            lambda name, number: row_place(f"jsonl:{paths[name].examples}", Path(), number),
            lambda name, number: row_place(f"jsonl:{paths[name].test}", Path(), number),
            "`--drop-overlaps` leaves such examples out",
        )
        return list(adapters)
    tested = {row.question for rows in tests.values() for row in rows}
    return [_without(one, examples.get(one.name, []), tested, out) for one in adapters]


def _without(one: Found, rows: Sequence[Row], tested: set[str], out: Path) -> Found:
    """The adapter with a new file of examples in `out`, if any of its examples is a test row."""
    kept = [number for number, row in enumerate(rows) if row.question not in tested]
    if one.examples is None or len(kept) == len(rows):
        return one
    note = (
        f"{len(rows) - len(kept):,} of {len(rows):,} examples of {one.examples.name} are test rows,"
        " and were left out"
    )
    if not kept:
        say(f"{one.name}: {note}", "note")
        return replace(one, examples=None, note=note)
    lines = [line for line, _ in json_lines(one.examples)]
    path = out / f"{one.name}.train.jsonl"
    say(f"{one.name}: {note}; the others go into {path}", "note")
    rows_left = "".join(lines[number].rstrip("\n") + "\n" for number in kept)
    return replace(one, examples=path, note=note, rows=rows_left)


def _read(path: Path) -> list[Row]:
    return read_rows(f"jsonl:{path.absolute()}", path.parent, ALL_ROWS)


def check_overlaps(
    context: RunContext,
    examples: Mapping[str, Sequence[Row]],
    spans: Sequence[SpannedRow | SpannedTurns],
    tests: Mapping[str, Sequence[Row]],
    prompts: Sequence[str],
) -> None:
    """Refuse test rows that gates would be fitted to; an `ExamplesError` names the place of both.

    Args:
        prompts: of the recipe's pool
    """
    recipe = context.recipe
    sources = {section.name: section.test for section in recipe.experts}
    sources |= {task.called: task.rows for task in recipe.benchmark.tasks}
    test_place = partial(_place, sources, context.folder)
    refuse_overlap(examples, tests, partial(place_of_example, context), test_place)
    spans_place = f"in {recipe.gates.spans}"
    refuse_overlap(prompt_parts(spans), tests, lambda *_: spans_place, test_place)
    pool = {"": [Row(prompt, "") for prompt in prompts]}
    pool_place = f"in {recipe.gates.pool}"
    refuse_overlap(pool, tests, lambda *_: pool_place, test_place, kind="a prompt of gates.pool")


def say_shared(examples: Mapping[str, Sequence[Row]]) -> None:
    """Print which experts have examples in common, if any do."""
    owners: dict[str, set[str]] = {}
    for name, rows in examples.items():
        for row in rows:
            owners.setdefault(row.question, set()).add(name)
    shared = [own for own in owners.values() if len(own) > 1]
    together = set().union(*shared)
    if names := [name for name in examples if name in together]:
        say(
            f"{listed(names, MOST_NAMED)} have {counted(len(shared), 'example')} in common, by"
            " which gates cannot tell them apart",
            "note",
        )


def place_of_example(context: RunContext, name: str, number: int) -> str:
    """The place of an expert's example: file and line, or source and number."""
    sources = {one.name: one.examples for one in context.recipe.experts if one.examples != AUTO}
    return _place(sources, context.folder, name, number)


def _place(sources: Mapping[str, str | None], folder: Path, name: str, number: int) -> str:
    """The place of a row: file and line, or source and number."""
    source = sources.get(name)
    return row_place(source, folder, number) if source else f"row {number + 1}"
