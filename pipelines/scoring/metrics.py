"""The value of an answer. Each metric is a pure function of one answer and its row.

    exact_match     1 if the normalised texts are equal
    numeric_match   1 if the last numbers are equal as numbers
    sentence_bleu   sacrebleu's sentence BLEU over 100, 0 to 1
    rouge1 rouge2 rougeL                          rouge-score's F1, 0 to 1
    verified        1 if reasoning-gym's own scorer gives full credit
    acc acc_norm    1 if the right choice has the largest log-likelihood, plain or per byte

An empty answer has value 0 and counts like any other. With several right answers the value is that
of the nearest.
"""

import inspect
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from typing import Any

from pipelines.data.row_sources import reasoning_task
from pipelines.data.rows import ExamplesError, Row

RIGHT, ATTEMPTED = "composite_right", "composite_attempted"
"""Metrics of composites: the shares of questions with a right answer, and with any answer."""
TURNS_RIGHT = "conversation_right"
"""The metric of conversations: the mean over the turns, each by the metric of its task."""
NUMBER = re.compile(
    r"((?<!\d)[-+])?(\d[\d,]*|(?<![\d.])(?=\.\d))((?:\.\d+)?(?:[eE][-+]?\d{1,3}\b)?)"
)
"""Sign, whole part and the rest of a decimal number. It does not backtrack."""
GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+")
"""A whole part with commas between thousands; other commas separate numbers."""
JOINED = re.compile(r"\d[/:]\d[\d,.]*+\D*+$")
"""A last number of a text that is a part of a fraction or of a time. It does not backtrack."""
SPLIT = re.compile(
    r"\d(?: ?/ ?|[-\N{EN DASH}\N{MINUS SIGN}]| [-\N{EN DASH}] "
    r"|[ \u00a0\u2009\u202f'\N{RIGHT SINGLE QUOTATION MARK}_^\u066b\u066c])\d[\d,.]*+\D*+$"
)
"""The same for what a right answer must not be either: a spaced fraction, a date, a range, a power,
or digits with another mark between them than comma and point."""
LAST_DIGITS = re.compile(r"(?<![\d,.])\d[\d,.]*+(?=\D*+$)")
"""The last digits of a text with the commas and points between them."""
PLAIN = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?[,.]*")
"""One number with a point before its fraction, and what ends a sentence; not 3,5 or 1.2.2021."""
UNIT = re.compile(r"[^\W\d_](?<!\d[eE])\^?[23]\D*+$")
"""A last digit that is a part of a unit or a formula: m2, CO2."""
MINUS = {ord("\N{MINUS SIGN}"): "-", ord("\N{EN DASH}"): "-"}
LONGEST_NUMBER = 1000
"""The most characters of a number; a longer one counts as none."""
RUNS_ANSWERS = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
"""A scorer whose module calls one of these might run an answer as code."""


def normalise(text: str) -> str:
    """The text in Unicode NFC, stripped, with each run of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(output: str, row: Row) -> float:
    """1 if the normalised texts are equal; a right answer with words around it gets 0."""
    text = normalise(output)
    return float(bool(text) and any(text == normalise(answer) for answer in row.answers))


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or the last one after `####` (as in GSM8K); None without one."""
    found = NUMBER.findall(text.rpartition("####")[2].translate(MINUS))
    if not found or sum(map(len, found[-1])) > LONGEST_NUMBER:
        return None
    sign, whole, rest = found[-1]
    whole = whole.rstrip(",")
    if not GROUPED.fullmatch(whole):
        whole = whole.rpartition(",")[2]
    return Decimal(sign + whole.replace(",", "") + rest)


def numeric_match(output: str, row: Row) -> float:
    """1 if the last number equals that of a right answer; 1,200.0 equals 1200.

    A last number that is a part of a fraction or of a time, as in 1/42, is no answer.
    """
    number = None if _ends_in_part(output) else last_number(output)
    return float(number is not None and any(number == last_number(a) for a in row.answers))


def _ends_in_part(text: str) -> bool:
    """Whether the number of `last_number` is a part of a fraction or of a time."""
    return JOINED.search(text.rpartition("####")[2]) is not None


def sentence_bleu(output: str, row: Row) -> float:
    """Sacrebleu's sentence BLEU with effective order, divided by 100.

    It is not corpus BLEU, since paired tests and the bootstrap need a value for each row.
    """
    if not output.strip():
        return 0.0
    score = _bleu().sentence_score(output, list(row.answers)).score
    return min(1.0, score / 100)  # for equal texts sacrebleu returns a little more than 100


@cache
def _bleu() -> Any:  # noqa: ANN401
    from sacrebleu.metrics.bleu import BLEU  # noqa: PLC0415  (slow to import; only this metric needs it)

    return BLEU(effective_order=True)


def _rouge(kind: str, output: str, row: Row) -> float:
    if not output.strip():
        return 0.0
    return float(_rouge_scorer(kind).score_multi(list(row.answers), output)[kind].fmeasure)


@cache
def _rouge_scorer(kind: str) -> Any:  # noqa: ANN401
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

    return RougeScorer([kind], tokenizer=_Words())


class _Words:
    """Words of letters and digits of any script; rouge-score's own tokenizer knows only a to z.

    Marks belong to words, such as the vowel signs of Hindi; for `re` they are no letters. Scripts
    that write no spaces, such as Chinese, have one word from mark to mark.
    """

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text.lower())
        return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()


def verified(output: str, row: Row) -> float:
    """1 if the scorer of the row's reasoning-gym task gives full credit.

    Partial credit counts as 0: the scorers often give it to a right answer with words around it. An
    answer that makes the scorer fail counts as 0, too: some parse it as a number, or as JSON.

    Raises:
        ExamplesError: the row has no scorer, or its scorer might run the answer as code.
    """
    if not output.strip():
        return 0.0
    kind, _, rest = row.checker.partition(":")
    name, _, place = rest.rpartition("@")
    seed, _, number = place.partition("#")
    if kind != "reasoning_gym" or not seed.isdecimal() or not number.isdecimal():
        raise ExamplesError(without_scorer(row))
    task = reasoning_task(name, int(seed), int(number) + 1)
    if runs_answers(task):
        raise ExamplesError(
            f"reasoning_gym:{name}: its scorer may run an answer as code, but answers come from"
            " adapters that cannot be trusted; choose exact_match"
        )
    entry = task[int(number)]
    try:
        return float(task.score_answer(output.strip(), entry) >= 1.0)
    except Exception:  # each of 91 scorers fails in its own way
        return 0.0


def without_scorer(row: Row) -> str:
    """The message for a row that `verified` cannot score."""
    return (
        f"the prompt {row.prompt[:60]!r} has no scorer; `verified` needs rows of"
        " `reasoning_gym:…`, so choose exact_match"
    )


def without_reference(name: str, row: Row) -> str:
    """The message for a row that gets 0 from a metric of texts, whatever the answer; else empty."""
    if name not in WORDS_NEEDED:
        return ""
    least = WORDS_NEEDED[name]
    if any(normalise(one) and len(_Words().tokenize(one)) >= least for one in row.answers):
        return ""
    needs = f" of {least} words or more" * (least > 1)
    return (
        f"{row.response[:60]!r} is no answer{needs}, and {name} compares with one, so that no"
        " answer can be right; take the row out, or choose another metric"
    )


def without_number(row: Row) -> str:
    """The message for a row that `numeric_match` cannot score; empty if it can."""
    if several := [answer for answer in row.answers if not _is_one_number(answer)]:
        what = f"{several[0][:60]!r} is not one number"
    elif all(last_number(answer) is None for answer in row.answers):
        what = f"{row.response[:60]!r} has no number"
    else:
        return ""
    return f"{what}, which numeric_match needs; choose exact_match"


def _is_one_number(answer: str) -> bool:
    """Whether the last number of an answer, if it has one, is a number by itself."""
    if _ends_in_part(answer):
        return False
    end = answer.rpartition("####")[2]
    digits = LAST_DIGITS.search(end)
    if SPLIT.search(end) or (digits and not PLAIN.fullmatch(digits[0])):
        return False
    return not (UNIT.search(end) and len(NUMBER.findall(end)) > 1)


def runs_answers(task: object) -> bool:
    """Whether the module of a scorer contains a call that may run text as code."""
    module = inspect.getmodule(type(task))
    return module is None or RUNS_ANSWERS.search(inspect.getsource(module)) is not None


def acc(log_likelihoods: Sequence[float], row: Row) -> float:
    """1 if a right choice has the largest log-likelihood."""
    if any(map(math.isnan, log_likelihoods)) or math.isinf(max(log_likelihoods)):
        return 0.0  # the model overflowed, and `max` would name the first choice
    likeliest = max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)
    return float(row.choices[likeliest] in row.answers)


def acc_norm(log_likelihoods: Sequence[float], row: Row) -> float:
    """1 if a right choice has the largest log-likelihood per byte of its UTF-8 text."""
    lengths = [max(1, len(choice.encode())) for choice in row.choices]
    return acc([value / n for value, n in zip(log_likelihoods, lengths, strict=True)], row)


@dataclass(frozen=True)
class Metric:
    """A way to judge an answer."""

    compute: Callable[[Any, Row], float]
    """The value of an answer, from its text or its choices' log-likelihoods, and its row."""
    graded: bool = False
    """Whether a row may be partly right; then the score's interval is a bootstrap's."""
    of_choices: bool = False
    """Whether it uses the log-likelihoods of choices; then no answer is generated."""


METRICS = {
    "exact_match": Metric(exact_match),
    "numeric_match": Metric(numeric_match),
    "sentence_bleu": Metric(sentence_bleu, graded=True),
    "rouge1": Metric(partial(_rouge, "rouge1"), graded=True),
    "rouge2": Metric(partial(_rouge, "rouge2"), graded=True),
    "rougeL": Metric(partial(_rouge, "rougeL"), graded=True),
    "verified": Metric(verified),
    "acc": Metric(acc, of_choices=True),
    "acc_norm": Metric(acc_norm, of_choices=True),
}
"""Each metric by its name in a recipe."""
WORDS_NEEDED = {"exact_match": 0, "sentence_bleu": 0, "rouge1": 1, "rouge2": 2, "rougeL": 1}
"""The fewest words of a right answer that can get more than 0, for metrics that compare texts."""
