"""What an answer is worth, and that none of the known ways to look better works."""

import time
from math import inf, nan
from pathlib import Path
from typing import get_args

import pytest

from pipelines.data.composites import split_answers
from pipelines.data.row_sources import read_rows, reasoning_task
from pipelines.data.rows import ExamplesError, Row
from pipelines.recipe.benchmark import MetricName
from pipelines.scoring import metrics
from pipelines.scoring.metrics import METRICS, runs_answers, without_number

PAGE = Path(metrics.__file__).parents[1] / "docs/benchmarks.md"
TEXT_METRICS = [name for name, metric in METRICS.items() if not metric.of_choices]


def worth(metric: str, output: str, *answers: str) -> float:
    return METRICS[metric].compute(output, Row("q", answers[0], references=answers[1:]))


def test_recipes_and_pages_know_every_metric() -> None:
    assert [*METRICS] == [*get_args(MetricName)]
    page = PAGE.read_text(encoding="utf-8")
    assert not [name for name in METRICS if f"`{name}`" not in page]
    assert not [name for name in METRICS if name not in str(metrics.__doc__)]


@pytest.mark.parametrize(
    ("output", "reference", "value"),
    [
        ("42", "42", 1.0),
        ("  42\n", "42", 1.0),
        ("a  b", "a b", 1.0),
        ("e\u0301", "\u00e9", 1.0),
        ("", "42", 0.0),
        ("42.", "42", 0.0),
        ("it is 42", "42", 0.0),
        ("", "", 0.0),
    ],
)
def test_exact_match_forgives_white_space_and_nothing_else(
    output: str, reference: str, value: float
) -> None:
    assert worth("exact_match", output, reference) == value


def test_the_right_answer_among_all_choices_is_a_wrong_answer() -> None:
    """The reference counts a gold string anywhere in the output, so echoing the choices wins."""
    echo = "red, green or blue"
    assert worth("exact_match", echo, "red") == 0
    assert worth("sentence_bleu", echo, "red") < 0.5
    assert worth("rougeL", echo, "red") <= 0.4
    row = read_rows("reasoning_gym:chain_sum", Path(), 1)[0]
    assert METRICS["verified"].compute(row.response, row) == 1
    assert METRICS["verified"].compute(f"1 {row.response} 3", row) == 0


@pytest.mark.parametrize("metric", TEXT_METRICS)
@pytest.mark.parametrize("output", ["", "  \n"])
def test_an_empty_answer_has_value_zero(metric: str, output: str) -> None:
    """The reference leaves them out of BLEU and ROUGE, which raises the mean of the others."""
    row = read_rows("reasoning_gym:chain_sum", Path(), 1)[0]
    assert METRICS[metric].compute(output, row) == 0


def test_a_number_inside_a_line_is_no_second_answer() -> None:
    """The reference cuts composite answers at the first "2. ", which "in 2022. " holds."""
    assert split_answers("1. It was in 2022. Paris", 3) == {1: "It was in 2022. Paris"}


@pytest.mark.parametrize(
    ("output", "reference", "value"),
    [
        ("the answer is 1,200", "1200.0", 1.0),
        ("It is 1,200, all in.", "1200", 1.0),
        ("It is 1,200, all in.", "200", 0.0),
        ("3 + 4 = 7", "7", 1.0),
        ("7 = 3 + 4", "7", 0.0),
        ("so much: -5", "5", 0.0),
        ("2 and 3\n#### 5", "x #### 5", 1.0),
        ("2 and 5\n####", "5", 0.0),
        ("none", "5", 0.0),
        ("5", "none", 0.0),
        ("0.30", "0.3", 1.0),
        ("9" * 10_000, "9", 0.0),
        ("9" * 10_000, "9" * 10_000, 0.0),
        (".5", "5", 0.0),
        ("-.5", "-0.50", 1.0),
        ("so ...5", "5", 1.0),
        ("4.2.5", "5", 1.0),
        ("1" * 40, "1" * 39 + "2", 0.0),
        ("1" * 40, "1" * 40, 1.0),
        ("\N{MINUS SIGN}5", "-5", 1.0),
        ("\N{EN DASH}5", "5", 0.0),
        ("10-5", "5", 1.0),
        ("1.5e3", "1500", 1.0),
        ("1e5", "5", 0.0),
        ("3,4", "34", 0.0),
        ("3,4", "4", 1.0),
        ("1,2000", "2000", 1.0),
        ("5,", "5", 1.0),
        ("1/42", "42", 0.0),
        ("at 10:42 h", "42", 0.0),
        ("so\n#### 84/42", "42", 0.0),
        ("84/2 = 42", "42", 1.0),
        pytest.param("1/1" + "," * 50_000 + "x" + "," * 50_000 + "42", "42", 1.0, id="long"),
    ],
)
def test_numbers_are_compared_as_numbers(output: str, reference: str, value: float) -> None:
    assert worth("numeric_match", output, reference) == value


@pytest.mark.parametrize("text", ["1.1", "1,", "1 ", "1-", "1_1 ", "m2"])
def test_a_long_right_answer_is_judged_in_linear_time(text: str) -> None:
    start = time.perf_counter()
    without_number(Row("q", text * 60_000 + "x1x"))
    assert time.perf_counter() - start < 5


def test_bleu_and_rouge_are_those_of_their_libraries() -> None:
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415
    from sacrebleu import sentence_bleu  # noqa: PLC0415

    said, meant = "the cat sat on a mat today", "the cat sat on the mat"
    assert worth("sentence_bleu", said, meant) == pytest.approx(
        sentence_bleu(said, [meant]).score / 100
    )
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for kind, score in scorer.score(meant, said).items():
        assert worth(kind, said, meant) == score.fmeasure
        assert worth(kind, meant, meant) == 1


def test_rouge1_does_not_compute_rouge_l(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its longest common sequence takes half a minute and 800 MB for texts of 10,000 words."""
    monkeypatch.delattr("rouge_score.rouge_scorer._score_lcs")
    assert worth("rouge1", "a b", "a c") == 0.5


@pytest.mark.parametrize("text", ["the cat sat on the mat", "привет мир", "naïve 7", "कि के"])
@pytest.mark.parametrize("metric", ["sentence_bleu", "rouge1", "rougeL"])
def test_equal_texts_of_any_script_have_one(metric: str, text: str) -> None:
    assert worth(metric, text, text) == 1.0


@pytest.mark.parametrize(
    ("said", "meant", "value"),
    [("के", "कि", 0.0), ("nai\u0308ve", "na\u00efve", 1.0), ("snake_case", "snake case", 1.0)],
)
def test_words_of_rouge_keep_their_vowel_signs(said: str, meant: str, value: float) -> None:
    assert worth("rouge1", said, meant) == value


def test_an_answer_at_which_a_scorer_fails_is_wrong() -> None:
    row = read_rows("reasoning_gym:prime_factorization", Path(), 1)[0]
    assert METRICS["verified"].compute("The factors are 2 and 3", row) == 0


@pytest.mark.parametrize("metric", ["exact_match", "numeric_match", "sentence_bleu", "rougeL"])
def test_of_several_right_answers_the_nearest_counts(metric: str) -> None:
    assert worth(metric, "seven is 7", "six is 6", "seven is 7") == pytest.approx(1)


def test_a_choice_is_right_if_its_log_likelihood_is_largest() -> None:
    row = Row("q", "long answer", choices=("short", "long answer"))
    assert METRICS["acc"].compute([-3.0, -2.0], row) == 1
    assert METRICS["acc"].compute([-2.0, -3.0], row) == 0
    assert METRICS["acc_norm"].compute([-2.0, -3.0], row) == 1  # 0.4 a byte against 0.27
    wide = Row("q", "éé", choices=("ab", "éé"))
    assert METRICS["acc_norm"].compute([-2.0, -3.0], wide) == 1  # four bytes, two characters
    several = Row("q", "a", choices=("a", "b", "c"), references=("b",))
    assert [METRICS["acc"].compute(w, several) for w in ([0, 1, 0], [0, 0, 1])] == [1, 0]


@pytest.mark.parametrize("broken", [[nan, nan], [-1.0, nan], [-inf, -inf], [inf, -1.0]])
def test_a_model_that_overflows_chooses_nothing(broken: list[float]) -> None:
    row = Row("q", "a", choices=("a", "b"))
    assert METRICS["acc"].compute(broken, row) == METRICS["acc_norm"].compute(broken, row) == 0
    assert METRICS["acc"].compute([-1.0, -inf], row) == 1


def test_a_scorer_that_would_run_an_answer_as_code_is_refused() -> None:
    row = read_rows("reasoning_gym:polynomial_multiplication", Path(), 1)[0]
    with pytest.raises(ExamplesError, match="may run an answer as code"):
        METRICS["verified"].compute("__import__('os').abort()", row)
    assert not runs_answers(reasoning_task("chain_sum", 0, 1))
    with pytest.raises(ExamplesError, match="has no scorer"):
        METRICS["verified"].compute("x", Row("q", "a"))
