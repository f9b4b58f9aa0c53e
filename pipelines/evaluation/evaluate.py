"""Ask a system a task: its answers, the value of each answer, and the scores."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from meteora.artifacts import BenchmarkSpec, Score
from pipelines.data.rows import ExamplesError
from pipelines.evaluation.conversations import Conversing
from pipelines.evaluation.harness import HARNESS, BenchmarkError, Harness, refuse_too_long
from pipelines.evaluation.measurements import ONE_EXPERT
from pipelines.evaluation.resume import Log, answer_in_portions
from pipelines.scoring.intervals import standard_error
from pipelines.scoring.metrics import TURNS_RIGHT
from pipelines.scoring.outputs import RowValues, compute_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.evaluation.tasks import Task


@dataclass(frozen=True)
class TaskResult:
    """The answers of one system to one task, and the value of each."""

    values: Mapping[str, RowValues]
    """By metric."""
    outputs: tuple[dict[str, Any], ...]
    """One for each row, in order: prompt, reference, output, and each metric's value."""
    templated: bool
    """Whether prompts were put into the tokenizer's chat template."""
    wall_seconds: float

    def score(self, spec: BenchmarkSpec, outputs_sha256: str, device: str) -> Score:
        """The score of `spec`'s metric; `outputs_sha256` names the blob with `outputs`."""
        values = self.values[spec.metric]
        method, low, high = values.interval(spec.seed)
        answers = [
            answer
            for row in self.outputs
            for answer in (json.loads(row["turns"]) if "turns" in row else [row])
            if "truncated" in answer  # outputs of lm-eval's own tasks do not have it
        ]
        lengths = [row["prompt_tokens"] for row in self.outputs if "prompt_tokens" in row]
        return Score(
            spec=spec,
            value=values.mean,
            stderr=standard_error(values.values),
            low=low,
            high=high,
            num_samples=len(self.outputs),
            outputs_sha256=outputs_sha256,
            harness=HARNESS,
            wall_seconds=self.wall_seconds,
            higher_is_better=values.higher_is_better,
            interval=method,
            templated=self.templated,
            num_empty=sum(not turn["output"].strip() for turn in answers),
            num_truncated=sum(turn["truncated"] for turn in answers),
            mean_prompt_tokens=sum(lengths) / len(lengths) if lengths else None,
            max_prompt_tokens=max(lengths, default=None),
            parts=values.parts,
            device=device,
            turns=values.turns,
        )


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    batch_size: int,
    seed: int = 0,
    control: str = "",
    log: Log | None = None,
    advance: Callable[[int], None] = lambda _rows: None,
) -> TaskResult:
    """Ask a live model, with the routing that it has now, every question of a task.

    The prompts have to fit the model and its chat template; `planning.room` checks that before.

    Args:
        control: for conversations, the control that the model acts as; see `conversations`
        log: the answers of the same measurement before it was stopped; new ones are added
        advance: called with the number of prompts, or pairs of prompt and choice, that are done

    Raises:
        BenchmarkError: lm-eval does not have the task, or cannot score it; or a conversation with
            the model's answers is too long, or is refused by the chat template.
    """
    log = log or Log()
    started = time.perf_counter() - log.earlier_seconds
    harness = Harness(
        model,
        tokenizer,
        batch_size=batch_size,
        template=task.template,
        system_prompt=task.system_prompt,
        seed=seed,
        advance=advance,
    )
    if task.lm_eval:
        # takes seconds to import, and few recipes need it
        from pipelines.evaluation.lm_eval_tasks import ask_lm_eval_task  # noqa: PLC0415

        values, outputs = ask_lm_eval_task(harness, task)
    else:
        answer = partial(answer_in_portions, batch_size=batch_size, log=log, advance=advance)
        if task.dialogues:
            values, outputs = _ask_dialogues(harness, task, answer, control)
        else:
            outputs = _ask_rows(harness, task, answer)
            values = compute_values(outputs, task.metrics)
    for metric, of_rows in values.items():
        for row, value in zip(outputs, of_rows.values, strict=True):
            row[metric] = value
    return TaskResult(
        values, tuple(outputs), harness.templated, wall_seconds=time.perf_counter() - started
    )


def _ask_rows(
    harness: Harness, task: Task, answer: Callable[..., list[Any]]
) -> list[dict[str, Any]]:
    """The outputs of a task with rows or composites, by `answer_in_portions`, without values."""
    items = task.composites or task.rows
    prompts = [one.prompt for one in items]
    lengths = harness.prompt_tokens(prompts)
    outputs: list[dict[str, Any]] = [
        {"prompt": prompt, "prompt_tokens": n} for prompt, n in zip(prompts, lengths, strict=True)
    ]
    if task.generates:
        generate = partial(harness.generate, max_new_tokens=task.max_new_tokens)
        answers = answer(prompts, generate, phase="generate")
        for row, (text, truncated) in zip(outputs, answers, strict=True):
            row |= {"output": text, "truncated": truncated}
    if task.weighs:
        weighed = answer(
            task.rows,
            harness.log_likelihoods,
            phase="weigh",
            parts_of=lambda row: len(row.choices),
        )
        for row, log_likelihoods in zip(outputs, weighed, strict=True):
            row["log_likelihoods"] = log_likelihoods
    for row, one in zip(outputs, items, strict=True):
        row["reference"] = one.response
        row["asked"] = json.dumps(one.to_dict(), ensure_ascii=False)
        if task.composites:
            row["judged_by"] = json.dumps(dict(task.part_metrics), sort_keys=True)
    return outputs


def _ask_dialogues(
    harness: Harness, task: Task, answer: Callable[..., list[Any]], control: str
) -> tuple[Mapping[str, RowValues], list[dict[str, Any]]]:
    """The values and outputs of a task of conversations.

    For `one_expert` every expert whose task takes part is tried; the best one's values count.
    """
    candidates = [*task.part_metrics] if control == ONE_EXPERT else [""]
    tried = [_ask_dialogues_as(harness, task, answer, control, name) for name in candidates]
    return max(tried, key=lambda one: one[0][TURNS_RIGHT].mean)


def _ask_dialogues_as(
    harness: Harness, task: Task, answer: Callable[..., list[Any]], control: str, expert: str
) -> tuple[Mapping[str, RowValues], list[dict[str, Any]]]:
    conversing = Conversing(
        harness.model,
        harness.tokenizer,
        max_new_tokens=task.max_new_tokens,
        batch_size=harness.batch_size,
        control=control,
        expert=expert,
        check=lambda lengths: refuse_too_long(
            task.name, lengths, task.max_new_tokens, harness.max_length
        ),
        advance=harness.advance,
    )
    try:
        answers = answer(
            task.dialogues,
            conversing.ask,
            phase=f"converse {expert}".strip(),
            parts_of=lambda dialogue: len(dialogue.questions),
        )
    except ExamplesError as error:
        raise BenchmarkError(
            f"task {task.name}: its conversations are not possible with this base: {error}"
        ) from error
    outputs: list[dict[str, Any]] = [
        {
            "prompt": "\n\n".join(question.row.prompt for question in dialogue.questions),
            "prompt_tokens": turns[-1]["prompt_tokens"],
            "output": "\n\n".join(turn["output"].strip() for turn in turns),
            "reference": "\n\n".join(question.row.response for question in dialogue.questions),
            "asked": json.dumps(dialogue.to_dict(), ensure_ascii=False),
            "judged_by": json.dumps(dict(task.part_metrics), sort_keys=True),
            "turns": json.dumps(turns, ensure_ascii=False),
            "expert": expert,
        }
        for dialogue, turns in zip(task.dialogues, answers, strict=True)
    ]
    return compute_values(outputs, task.metrics), outputs
