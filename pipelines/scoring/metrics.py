"""What an answer is worth. Each metric is a pure function of one answer and its row.

    exact_match     1 where the normalised texts are equal
    numeric_match   1 where the last numbers are equal as numbers
    sentence_bleu   sacrebleu's sentence BLEU over 100, 0 to 1
    rouge1 rouge2 rougeL                          rouge-score's F1, 0 to 1
    verified        1 where reasoning-gym's own scorer calls it wholly right
    acc acc_norm    1 where the right choice has the largest log-likelihood, plain or per byte

An empty answer is worth 0 and counts like any other. Of several right answers the nearest counts.
"""

from __future__ import annotations

import inspect
import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pipelines.data.row_sources import reasoning_task
from pipelines.data.rows import ExamplesError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pipelines.data.rows import Row

RIGHT, ATTEMPTED = "composite_right", "composite_attempted"
"""Shares of a composite's questions: answered rightly, and answered at all."""
NUMBER = re.compile(r"[-+]?\d[\d,]{0,30}(?:\.\d{1,30})?")
RUNS_ANSWERS = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
"""A scorer whose module does this might run what a model says as code."""


def normalise(text: str) -> str:
    """What exact match compares: Unicode NFC, white space at the ends off, runs of it one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(output: str, row: Row) -> float:
    """1 where the normalised texts are equal; a right answer among other words is a wrong one."""
    said = normalise(output)
    return float(bool(said) and any(said == normalise(answer) for answer in row.answers))


def last_number(text: str) -> Decimal | None:
    """The number that a text ends up with: its last one, or the last after `####` (GSM8K)."""
    found = NUMBER.findall(text.rpartition("####")[2])
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:
        return None


def numeric_match(output: str, row: Row) -> float:
    """1 where the last number of the output is that of a right answer: 1,200.0 is 1200."""
    said = last_number(output)
    return float(said is not None and any(said == last_number(a) for a in row.answers))


def sentence_bleu(output: str, row: Row) -> float:
    """Sacrebleu's sentence BLEU with effective order, over 100; the mean over rows is the score.

    Not corpus BLEU: only a value a row can be compared in pairs and resampled like all others.
    """
    if not output.strip():
        return 0.0
    return _bleu().sentence_score(output, list(row.answers)).score / 100


@lru_cache(maxsize=1)
def _bleu() -> Any:  # noqa: ANN401
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415  (a finished run needs none of it)

    return BLEU(effective_order=True)


def _rouge(kind: str) -> Callable[[str, Row], float]:
    def score(output: str, row: Row) -> float:
        if not output.strip():
            return 0.0
        return float(_rouge_scorer().score_multi(list(row.answers), output)[kind].fmeasure)

    return score


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:  # noqa: ANN401
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


def verified(output: str, row: Row) -> float:
    """1 where the task's own scorer calls the answer wholly right.

    Its partial credit is not taken: much of it goes to a right answer among other words.
    """
    if not output.strip():
        return 0.0
    kind, _, rest = row.checker.partition(":")
    name, _, place = rest.rpartition("@")
    seed, _, number = place.partition("#")
    if kind != "reasoning_gym" or not seed.isdecimal() or not number.isdecimal():
        raise ExamplesError(
            f"the prompt {row.prompt[:60]!r} comes without a scorer; `verified` is for rows of"
            " `reasoning_gym:…`, choose exact_match"
        )
    task = reasoning_task(name, int(seed), int(number) + 1)
    if runs_answers(task):
        raise ExamplesError(
            f"reasoning_gym:{name}: its scorer may run an answer as code, and answers come from"
            " strangers' adapters; choose exact_match"
        )
    return float(task.score_answer(output.strip(), task[int(number)]) >= 1.0)


def runs_answers(task: object) -> bool:
    """Whether the module of a scorer evaluates text."""
    module = inspect.getmodule(type(task))
    return module is None or RUNS_ANSWERS.search(inspect.getsource(module)) is not None


def acc(log_likelihoods: Sequence[float], row: Row) -> float:
    """1 where a right choice has the largest log-likelihood."""
    return _chosen(log_likelihoods, row)


def acc_norm(log_likelihoods: Sequence[float], row: Row) -> float:
    """1 where a right choice has the largest log-likelihood per byte of its text."""
    lengths = [max(1, len(choice.encode())) for choice in row.choices]
    return _chosen([value / n for value, n in zip(log_likelihoods, lengths, strict=True)], row)


def _chosen(values: Sequence[float], row: Row) -> float:
    return float(row.choices[max(range(len(values)), key=values.__getitem__)] in row.answers)


@dataclass(frozen=True)
class Metric:
    name: str
    judge: Callable[[Any, Row], float]
    """From an answer's text, or its choices' log-likelihoods, and its row to a value."""
    graded: bool = False
    """Whether a row may be partly right: its interval is then found by bootstrap."""
    of_choices: bool = False
    """Whether it is computed from the log-likelihoods of choices, and nothing is generated."""


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", exact_match),
        Metric("numeric_match", numeric_match),
        Metric("sentence_bleu", sentence_bleu, graded=True),
        Metric("rouge1", _rouge("rouge1"), graded=True),
        Metric("rouge2", _rouge("rouge2"), graded=True),
        Metric("rougeL", _rouge("rougeL"), graded=True),
        Metric("verified", verified),
        Metric("acc", acc, of_choices=True),
        Metric("acc_norm", acc_norm, of_choices=True),
    )
}
