"""A task: rows, composites or dialogues made of rows, or a task of lm-eval's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from meteora.artifacts import canonical_sha256, file_sha256
from meteora.base.sources import path_from
from pipelines.data.composites import Composite, compose, fits
from pipelines.data.dialogues import Dialogue, draw_dialogues
from pipelines.data.row_sources import read_rows
from pipelines.data.rows import ExamplesError, Row, rows_sha256
from pipelines.recipe.benchmark import CompositeSection, metric_names
from pipelines.scoring.metrics import (
    ATTEMPTED,
    METRICS,
    RIGHT,
    TURNS_RIGHT,
    without_number,
    without_reference,
    without_scorer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipelines.recipe.benchmark import BenchmarkSection, ConversationSection, TaskSection
    from pipelines.recipe.recipe import ExpertSection

    Read = Callable[[str, Path, int], Sequence[Row]]

TURNS = 200
"""The turns of a task in all, if a recipe states no number of conversations. For independent turns
the interval of a share reaches at most seven points to each side."""


@dataclass(frozen=True)
class Task:
    """The prompts for a system, and the metrics that score its answers."""

    name: str
    metrics: tuple[str, ...]
    """Tables show the first."""
    template: str
    """`chat`, `plain` or `auto`."""
    max_new_tokens: int
    rows: Sequence[Row] = ()
    expert: str = ""
    """The expert that the rows belong to; empty for other tasks."""
    composites: Sequence[Composite] = ()
    dialogues: Sequence[Dialogue] = ()
    part_metrics: Mapping[str, str] = field(default_factory=dict)
    """For composites and dialogues: the metric of the questions from each task."""
    system_prompt: str | None = None
    """See `BenchmarkSpec.system_prompt`."""
    lm_eval: str = ""
    """The name of a task of lm-eval's own."""
    folder: Path | None = None
    """The folder of that task's files if it does not come with lm-eval."""
    limit: int = 0
    """The most rows of that task."""
    num_fewshot: int = 0
    """The number of solved examples in each prompt of that task, or of composites."""
    own_length: int | None = None
    """`max_new_tokens` if the recipe names it for that task; if not, the length is lm-eval's."""

    @property
    def mixed(self) -> Sequence[Composite] | Sequence[Dialogue]:
        """The composites or dialogues, made of several tasks' rows; empty for other tasks."""
        return self.composites or self.dialogues

    @cached_property
    def rows_sha256(self) -> str:
        """The hash for `BenchmarkSpec.rows_sha256`: of rows or definition, and system prompt."""
        if self.lm_eval:
            files = {"files": _definition(self.folder)} if self.folder else {}
            length = {} if self.own_length is None else {"max_new_tokens": self.own_length}
            asked = {"lm_eval": self.lm_eval, "limit": self.limit, **files, **length}
            sha256 = canonical_sha256(asked)
        else:
            sha256 = rows_sha256(self.mixed or self.rows)
        if self.system_prompt is None:
            return sha256
        return canonical_sha256({"rows": sha256, "system_prompt": self.system_prompt})

    @property
    def weighs(self) -> bool:
        """Whether a metric compares the log-likelihoods of choices."""
        return any(METRICS[m].of_choices for m in self.metrics if m in METRICS)

    @property
    def generates(self) -> bool:
        """Whether answers are generated here; False for a task of lm-eval's own."""
        own = [METRICS[m] for m in self.metrics if m in METRICS]
        return not self.lm_eval and (bool(self.mixed) or not all(m.of_choices for m in own))

    def longest_answer(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The most tokens of an answer, generated or chosen."""
        choices = [choice for row in self.rows for choice in row.choices] if self.weighs else []
        sizes = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in choices]
        return max([self.max_new_tokens if self.generates else 0, *sizes])

    @property
    def num_questions(self) -> int:
        """The number of prompts to answer, and of pairs of prompt and choice to compare."""
        if self.lm_eval:
            return self.limit
        if self.dialogues:
            return sum(len(dialogue.questions) for dialogue in self.dialogues)
        choices = sum(len(row.choices) for row in self.rows) if self.weighs else 0
        return choices + (len(self.composites or self.rows) if self.generates else 0)


def _definition(folder: Path) -> dict[str, str]:
    """SHA-256 of a folder's files of lm-eval tasks: YAML, Python, and files that YAML names."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    texts = "".join(path.read_text("utf-8", "replace") for path in files if path.suffix == ".yaml")
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in files
        if path.suffix in {".yaml", ".py"} or path.name in texts
    }


def make_tasks(
    experts: Sequence[ExpertSection],
    settings: BenchmarkSection,
    folder: Path,
    read: Read = read_rows,
) -> dict[str, Task]:
    """Every task of a recipe by name: the experts' own, the listed ones, composites, dialogues.

    Args:
        read: reads a source, as `read_rows` does

    Raises:
        ExamplesError: rows are missing or malformed, or a metric cannot score them.
    """
    tasks: dict[str, Task] = {}
    for expert in experts:
        if expert.test:
            tasks[expert.name] = Task(
                expert.name,
                metric_names(expert.metric) or ("exact_match",),
                settings.template,
                expert.max_new_tokens or settings.max_new_tokens,
                rows=read(expert.test, folder, settings.limit),
                expert=expert.name,
                system_prompt=settings.system_prompt,
            )
    for section in settings.tasks:
        tasks[section.called] = _listed_task(section, settings, folder, read)
    for task in tasks.values():
        check_rows(task)
    return tasks | _mixes(tasks, settings)


def check_rows(task: Task) -> None:
    """Raise `ExamplesError` for a row without the choices or the answer that a metric needs."""
    for row in task.rows:
        if task.weighs and not row.choices:
            raise ExamplesError(
                f"task {task.name}: the prompt {row.prompt[:60]!r} has no choices; give its row"
                " `choices`, or choose a metric for free answers"
            )
        if task.weighs and "" in row.choices:
            raise ExamplesError(
                f"task {task.name}: the prompt {row.prompt[:60]!r} has an empty choice, which is"
                " always the likeliest; take it out, or choose a metric for free answers"
            )
        if task.weighs and len(set(row.choices)) < 2:
            raise ExamplesError(
                f"task {task.name}: the prompt {row.prompt[:60]!r} has one choice, which is always"
                " the likeliest; give its row others, or take it out"
            )
        if task.weighs and set(row.choices) <= set(row.answers):
            raise ExamplesError(
                f"task {task.name}: every choice of the prompt {row.prompt[:60]!r} is right, so"
                " each answer scores; take its row out"
            )
        for metric in task.metrics:
            if problem := without_reference(metric, row):
                raise ExamplesError(f"task {task.name}: {problem}")
        if "verified" in task.metrics and not row.checker:
            raise ExamplesError(f"task {task.name}: {without_scorer(row)}")
        if "numeric_match" in task.metrics and (problem := without_number(row)):
            raise ExamplesError(f"task {task.name}: {problem}")


def _listed_task(
    section: TaskSection, settings: BenchmarkSection, folder: Path, read: Read
) -> Task:
    limit = section.limit or settings.limit
    return Task(
        section.called,
        metric_names(section.metric) or (("acc",) if section.lm_eval else ("exact_match",)),
        section.template or settings.template,
        section.max_new_tokens or settings.max_new_tokens,
        rows=read(section.rows, folder, limit) if section.rows else (),
        lm_eval=section.lm_eval,
        folder=path_from(folder, section.folder) if section.folder else None,
        limit=limit,
        num_fewshot=section.num_fewshot,
        own_length=section.max_new_tokens if section.lm_eval else None,
        system_prompt=settings.system_prompt,
    )


def _mixes(tasks: Mapping[str, Task], settings: BenchmarkSection) -> dict[str, Task]:
    mixes = {}
    for section in settings.mixes:
        rows, parts = _parts(tasks, section)
        task = Task(
            section.called,
            (TURNS_RIGHT,),
            settings.template,
            max((tasks[part].max_new_tokens for part in rows), default=0),
            part_metrics=parts,
            system_prompt=settings.system_prompt,
        )
        n, seed = section.n, settings.seed
        if isinstance(section, CompositeSection):
            count = num_prompts(section, settings, [sum(map(fits, own)) for own in rows.values()])
            mixes[task.name] = replace(
                task,
                metrics=(RIGHT, ATTEMPTED),
                max_new_tokens=task.max_new_tokens * n,
                composites=compose(rows, n, count, seed, section.num_fewshot),
                num_fewshot=section.num_fewshot,
            )
        else:
            count = num_prompts(section, settings, [len(own) for own in rows.values()])
            dialogues = draw_dialogues(rows, n, count, seed, settings.system_prompt)
            mixes[task.name] = replace(task, dialogues=dialogues)
    return mixes


def num_prompts(
    section: CompositeSection | ConversationSection,
    settings: BenchmarkSection,
    num_rows: Sequence[int],
) -> int:
    """How many composites or conversations are asked.

    Tasks are asked equally often. More than the default would ask rows of the smallest again, and
    intervals would take them for other ones.

    Args:
        num_rows: of each task, those that can be asked
    """
    if section.count:
        return section.count
    most = max(1, -(-min(num_rows, default=0) * len(num_rows) // section.n))
    wanted = settings.limit if isinstance(section, CompositeSection) else -(-TURNS // section.n)
    return min(wanted, most)


def _parts(
    tasks: Mapping[str, Task], section: CompositeSection | ConversationSection
) -> tuple[dict[str, Sequence[Row]], dict[str, str]]:
    """Rows and metric of each task that takes part, without a task whose expert was left out."""
    names = [n for n, task in tasks.items() if task.rows and n in (section.tasks or tasks)]
    metrics = {
        part: next((m for m in tasks[part].metrics if not METRICS[m].of_choices), "exact_match")
        for part in names
    }
    return {part: tasks[part].rows for part in names}, metrics
