"""Prints what a run needs: the estimated memory, disk and time of each stage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from meteora.artifacts import COMMIT, BaseSpec
from meteora.base.chat_template import ConversationError, encode_messages
from meteora.base.loading import load_tokenizer
from meteora.base.shapes import Shape, shape_of
from meteora.base.sources import GGUF, PATH, find_gguf
from pipelines.data.rows import ExamplesError, Row
from pipelines.hub.snapshot import cached
from pipelines.planning.estimate import ASSUMED_RANK, assumed_ranks, estimate
from pipelines.planning.examples import most_prompts
from pipelines.planning.passes import (
    ASSUMED_ANSWER_TOKENS,
    CHARACTERS_PER_TOKEN,
    Experts,
    Need,
    Rows,
)
from pipelines.planning.row_faults import is_at_hand
from pipelines.recipe.stage import Stage
from pipelines.workspace.bases import unfinished
from pipelines.workspace.faults import free_bytes
from pipelines.workspace.machine import LARGE, measure_machine
from store.files import size_of

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from pipelines.admission.experts import Expert
    from pipelines.planning.row_faults import Read
    from pipelines.recipe.recipe import Recipe
    from pipelines.workspace.context import RunContext

SAMPLE = 64
"""Rows of a source whose length is measured."""


def print_estimates(
    out: Console,
    context: RunContext,
    base: BaseSpec | None,
    accepted: Mapping[str, Expert],
    known: tuple[Shape, PreTrainedTokenizerBase | None] | None,
    stages: Collection[str],
    read: Read,
) -> list[str]:
    """Print the needs of these stages; returns a fault if the disk has too little free space."""
    recipe = context.recipe
    if known is None:
        out.print(
            "\nMemory and time cannot be estimated: the base's config is not here yet."
            " `hf download` can fetch it alone, and `--until base` fetches the whole base.",
            soft_wrap=True,
        )
        return []
    shape, tokenizer = known
    experts, num_assumed = _experts(recipe, shape, accepted)
    opening, turn = tokens_of_template(recipe, tokenizer)
    examples, tests, pool = _all_rows(context, tokenizer, read, turn)
    machine = measure_machine(shape.dtype)
    needs_on = partial(
        estimate,
        recipe,
        shape,
        experts=experts,
        examples=examples,
        tests=tests,
        pool=pool,
        opening_tokens=opening,
    )
    bring_base, *others = needs_on(machine=machine)
    to_write = max(0.0, bring_base.disk_bytes - _bytes_here(context, base))
    every_need = [replace(bring_base, disk_bytes=to_write), *others]
    needs = [need for need in every_need if need.stage in stages]
    out.print(f"\nEstimated, to a factor of two or so, for this machine ({machine.describe()}):")
    for need in needs:
        _print_need(out, need)
    out.print(f"  in all {duration(sum(need.seconds for need in needs))}, without downloads")
    if shape.dtype.itemsize == 2 and machine.is_cpu:
        on_large = [need for need in needs_on(machine=LARGE) if need.stage in stages]
        shown = ", ".join(f"{need.stage} {duration(need.seconds)}" for need in on_large)
        out.print(f"  on {LARGE.name}: {shown}", soft_wrap=True)
    if short := [need.stage for need in needs if need.memory_bytes > machine.memory_bytes]:
        out.print(
            f"  more memory than the {machine.memory_bytes / 1e9:,.1f} GB of this machine is needed"
            f" for: {', '.join(short)}"
        )
    every = [*examples.values(), *tests.values()]
    if num_assumed and Stage.stack in stages:
        out.print(
            f"  {num_assumed} of {experts.count} adapters are not here, or refused: taken as rank"
            f" {ASSUMED_RANK} on every linear layer"
        )
    most, free = _most_on_disk(needs), free_bytes(context.home)
    out.print(f"  disk: {most / 1e9:,.1f} GB at most, of {free / 1e9:,.1f} GB that are free there")
    absent = sum(not rows.known for rows in every)
    if absent and Stage.gates in stages:
        out.print(
            f"  {absent} of {len(every)} sources of rows are not here: assumed to have enough, with"
            f" {Rows.prompt_tokens:.0f} tokens a prompt and {Rows.answer_tokens:.0f} an answer"
        )
    if most > free:
        return [f"{context.home}: {most / 1e9:,.1f} GB are needed there; free some space"]
    return []


def _most_on_disk(needs: Iterable[Need]) -> float:
    """The most bytes on the disk at any moment of a run."""
    kept = most = 0.0
    for need in needs:
        kept, most = kept + need.disk_bytes, max(most, kept + need.scratch_bytes)
    return max(kept, most)


def _all_rows(
    context: RunContext, tokenizer: PreTrainedTokenizerBase | None, read: Read, turn_tokens: int
) -> tuple[dict[str, Rows], dict[str, Rows], Rows | None]:
    """The examples by expert, the tests by task, and the pool, if there is one.

    Args:
        turn_tokens: of the chat template, around each question and its answer
    """
    recipe, settings = context.recipe, context.recipe.benchmark

    def rows(source: str | None, limit: int, *, answered: bool = True) -> Rows:
        if not is_at_hand(source):  # also a task of lm-eval, with rows of its own
            return Rows(limit)
        try:
            source_rows = read(source, context.folder, limit, answered=answered)
        except ExamplesError:
            return Rows(limit)
        measured = _measured(source_rows, tokenizer)
        return replace(measured, prompt_tokens=measured.prompt_tokens + turn_tokens)

    limit, pool = recipe.gates.examples_per_expert, None
    examples = {e.name: rows(e.examples, limit) for e in recipe.experts if e.examples}
    if recipe.router.kind == "gate" and recipe.gates.pool:
        most = most_prompts(recipe, len(recipe.experts))
        pool = rows(recipe.gates.pool, most, answered=False)
        from_pool = replace(pool, count=limit, answer_tokens=ASSUMED_ANSWER_TOKENS)
        examples |= {e.name: from_pool for e in recipe.experts if not e.examples}
    tests = {e.name: rows(e.test, settings.limit) for e in recipe.experts if e.test}
    tests |= {t.called: rows(t.rows, t.limit or settings.limit) for t in settings.tasks}
    return examples, tests, pool


def _print_need(out: Console, need: Need) -> None:
    out.print(
        f"  {need.stage:9}  memory {need.memory_bytes / 1e9:7,.1f} GB"
        f"   disk {need.disk_bytes / 1e9:7,.1f} GB   time {duration(need.seconds):>8}"
    )
    if need.note:
        out.print(f"{'':13}{need.note}")
    for part, seconds in need.parts.items():
        out.print(f"{'':45}{part}, {duration(seconds)}")


def _bytes_here(context: RunContext, base: BaseSpec | None) -> float:
    """The bytes of the base that a run does not have to write any more."""
    if context.recipe.base.startswith(PATH):  # it stays where it is
        return math.inf
    return 0.0 if base is None else size_of(_folder_at_hand(context, base))


def _folder_at_hand(context: RunContext, base: BaseSpec) -> Path:
    """The folder with those files of a base that are on this disk; it may not exist."""
    folder = context.base_folder(base)
    return folder if folder.is_dir() else unfinished(folder)


def shape_at_hand(
    context: RunContext, base: BaseSpec | None
) -> tuple[Shape, PreTrainedTokenizerBase | None] | None:
    """The base's shape and tokenizer; None for files that are not on this disk.

    Without a `base`, as the Hub did not answer, a commit in the recipe is enough.
    """
    source = context.recipe.base
    repo_id, _, revision = source.partition("@")
    spec = base or BaseSpec(repo_id, revision)
    folder = _folder_at_hand(context, spec)
    if source.startswith(GGUF) and not folder.is_dir():
        file = find_gguf(source)
        return shape_of(file), load_tokenizer(file)
    if COMMIT.fullmatch(spec.base_revision) and not folder.is_dir():
        config = cached(spec.base_model, "config.json", spec.base_revision)
        folder = config.parent if config else folder
    if not (folder / "config.json").is_file():
        return None
    whole = (folder / "tokenizer.json").is_file()
    return shape_of(folder), load_tokenizer(folder) if whole else None


def _experts(recipe: Recipe, shape: Shape, accepted: Mapping[str, Expert]) -> tuple[Experts, int]:
    """The ranks of all experts, and the number of experts with assumed ranks."""
    ranks: Counter[str] = Counter()
    assumed = assumed_ranks(shape)
    for expert in recipe.experts:
        own = assumed
        if expert.name in accepted:
            own = {module.path: module.r for module in accepted[expert.name].adapter.spec.modules}
        ranks.update({path: r for path, r in own.items() if path in shape.linears})
    num_assumed = sum(expert.name not in accepted for expert in recipe.experts)
    return Experts(len(recipe.experts), ranks), num_assumed


def tokens_of_template(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, int]:
    """The tokens of the chat template: before the first question, and around each with its answer.

    Both are 0 without a template, or if it takes no conversation.
    """
    if tokenizer is None or not tokenizer.chat_template or recipe.benchmark.template == "plain":
        return 0, 0
    asked, answered = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    try:
        one, two = (
            len(encode_messages(tokenizer, talk)) for talk in ([asked], [asked, answered, asked])
        )
    except ConversationError:
        return 0, 0
    turn = max(0, two - one - 2)
    return max(0, one - 1 - turn), turn


def _measured(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None) -> Rows:
    """The number of rows, and the mean length of the first `SAMPLE` in tokens."""

    def length(text: str) -> float:
        if tokenizer is None:
            return len(text) / CHARACTERS_PER_TOKEN
        return len(tokenizer(text).input_ids)

    sample = rows[:SAMPLE]
    return Rows(
        len(rows),
        sum(length(row.prompt) for row in sample) / len(sample),
        sum(length(row.response) for row in sample) / len(sample),
        sum(len(row.choices) for row in sample) / len(sample),
        known=True,
    )


def duration(seconds: float) -> str:
    """Such as 40 s, 12 min, 7.5 h or 3.2 d."""
    if seconds < 1:
        return "< 1 s"
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800)):
        if seconds < most:
            return f"{seconds / length:.{0 if seconds >= 10 * length else 1}f} {unit}"
    return f"{seconds / 86_400:,.1f} d"
