"""Intervals and tests against textbooks, against scipy, and against what they promise."""

import math
import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.scoring import intervals


def test_wilsons_interval_is_the_one_in_the_textbook() -> None:
    """Values from Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20 and 1 of 29."""
    for successes, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert intervals.wilson(successes, total) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_holds_the_share_and_is_scipys(rows: tuple[int, int]) -> None:
    low, high = intervals.wilson(*rows)
    assert 0 <= low <= rows[0] / rows[1] <= high <= 1
    theirs = stats.binomtest(*rows).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_bootstrap_agrees_with_scipys_and_is_seeded() -> None:
    draw = random.Random(7)
    values = [draw.betavariate(2, 3) for _ in range(80)]
    name, *found = intervals.interval_of_mean(values, graded=True, seed=0)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
    assert found == pytest.approx([theirs.low, theirs.high], abs=0.005)
    again, other = (intervals.interval_of_mean(values, graded=True, seed=n) for n in (0, 1))
    assert again == (name, *found) != other


def test_a_bootstrap_of_equal_rows_keeps_a_width() -> None:
    for value in (0.0, 0.5):
        found = intervals.interval_of_mean([value] * 20, graded=True)
        assert found == ("bootstrap", *intervals.wilson(20 * value, 20))
    assert intervals.interval_of_mean([7.5] * 20, graded=True) == (
        "bootstrap",
        7.5,
        7.5,
    )  # no share
    one, other = (
        intervals.interval_of_mean(values, graded=True) for values in ([0.3, 0.1 + 0.2], [0.3] * 2)
    )
    assert one[1:] == pytest.approx(other[1:])


def test_intervals_contain_the_true_value_about_as_often_as_promised() -> None:
    draw = np.random.default_rng(0)
    hit = {"wilson": 0, "bootstrap": 0, "difference": 0}
    for _ in range(400):
        rows = draw.random(40) < 0.2
        low, high = intervals.wilson(rows.sum(), 40)
        hit["wilson"] += low <= 0.2 <= high
        graded = draw.beta(2, 3, 40)
        _, low, high = intervals.interval_of_mean(graded.tolist(), graded=True)
        hit["bootstrap"] += low <= 0.4 <= high
        ours, theirs = draw.random(40) < 0.7, draw.random(40) < 0.5
        low, high = intervals.difference_interval(ours.tolist(), theirs.tolist(), graded=False)
        hit["difference"] += low <= 0.2 <= high
    assert all(0.91 <= count / 400 <= 0.98 for count in hit.values()), hit


@pytest.mark.parametrize(("n", "left_out"), [(1, 0), (6, 0), (8, 0), (9, 1), (15, 3)])
def test_a_median_has_a_narrow_interval_that_holds_it(n: int, left_out: int) -> None:
    """The median is outside if so few of n values are below it, or so few above."""
    values = list(range(n))
    assert intervals.interval_of_median(values[::-1]) == (left_out, n - 1 - left_out)
    outside = [2 * stats.binom.cdf(number, n, 0.5) for number in (left_out, left_out + 1)]
    assert outside[1] > 0.05
    assert outside[0] <= 0.05 or n < 6


def test_mcnemar_counts_only_rows_that_differ() -> None:
    """5 against 15 of 20 that differ: twice the binomial tail."""
    ours = [1.0] * 5 + [0.0] * 15 + [1.0] * 50
    theirs = [0.0] * 5 + [1.0] * 15 + [1.0] * 50
    assert intervals.mcnemar(ours, theirs) == pytest.approx(2 * stats.binom.cdf(5, 20, 0.5))
    assert intervals.mcnemar(ours, ours) == 1
    assert intervals.mcnemar(ours, theirs) == intervals.mcnemar(theirs, ours)


def test_flipping_signs_is_exact_for_few_rows() -> None:
    """Four rows that are all better: of 16 ways to give signs two are as far from zero."""
    assert intervals.sign_flip([0.5, 0.6, 0.7, 0.8], [0.1] * 4) == pytest.approx(2 / 16)
    assert intervals.sign_flip([0.3] * 9, [0.3] * 9) == 1
    assert intervals.sign_flip([0.3] * 9, [*[0.3] * 8, 0.1]) == 1
    assert intervals.sign_flip([0.1 + 0.2] * 9, [0.3] * 9) == 1  # they differ by rounding alone


def test_rows_that_may_be_partly_right_are_tested_by_sign_flips() -> None:
    right, wrong, partly = [1.0] * 8, [0.0] * 8, [0.5] * 8
    assert intervals.paired_p(right, wrong) == intervals.mcnemar(right, wrong)
    for other in (partly, [*wrong[1:], 0.5]):
        assert intervals.paired_p(right, other, 3) == intervals.sign_flip(right, other, 3)
        assert intervals.are_graded(wrong, other)


def test_flips_of_many_rows_do_not_fill_the_memory() -> None:
    ours = np.random.default_rng(0).normal(0.05, 1, 2_000).tolist()
    tracemalloc.start()
    p_value = intervals.sign_flip(ours, [0.0] * 2_000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert p_value == 0.3228  # as without batches
    assert most < 1e8


@pytest.mark.parametrize("test", ["mcnemar", "sign_flip"])
def test_without_a_difference_a_test_rarely_finds_one(test: str) -> None:
    draw = np.random.default_rng(1)
    alarms = 0
    for _ in range(100):
        ours, theirs = (draw.random((2, 30)) < 0.5).astype(float)
        alarms += getattr(intervals, test)(ours.tolist(), theirs.tolist()) < 0.05
    assert alarms <= 8


def test_the_interval_of_a_difference_is_paired() -> None:
    """A paired test tells two systems apart that are right on nearly the same rows."""
    ours, theirs = [1.0] * 50 + [0.0] * 50, [1.0] * 40 + [0.0] * 60
    low, high = intervals.difference_interval(ours, theirs, graded=False)
    assert 0 < low < 0.1 < high < 0.2
    low, high = intervals.difference_interval(ours, ours, graded=False)
    assert low < 0 < high  # equal on 100 rows need not be equal on others
    graded = [value * 0.9 for value in ours]
    assert intervals.difference_interval(graded, theirs, graded=True)[0] > -0.1


def test_the_interval_of_a_difference_has_the_variance_of_its_rows_and_two_more() -> None:
    """Half a row in each cell: one is better, one is worse, both are right, none is."""
    ours, theirs = [1.0] * 9 + [0.0] * 2 + [1.0] * 20, [0.0] * 9 + [1.0] * 2 + [1.0] * 20
    apart, weights = np.array([1.0, -1.0, 0.0]), [9.5, 2.5, 21.0]
    mean = np.average(apart, weights=weights)
    variance = np.average((apart - mean) ** 2, weights=weights)
    expected = stats.norm(mean, math.sqrt(variance / 33)).interval(0.95)
    found = intervals.difference_interval(ours, theirs, graded=False)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize("apart", [-1.0, -0.25, 0.0, 0.6, 1.0])
def test_rows_that_all_differ_by_one_amount_leave_others_possible(n: int, apart: float) -> None:
    """The share of rows that may differ otherwise is Clopper and Pearson's, of 0 in n."""
    ours, theirs = [max(apart, 0.0)] * n, [max(-apart, 0.0)] * n
    low, high = intervals.difference_interval(ours, theirs, graded=True)
    assert -1 <= low <= apart <= high <= 1
    others = stats.binomtest(0, n).proportion_ci(method="exact").high
    assert (high - low) / 2 == pytest.approx(others)
    assert intervals.difference_interval(theirs, ours, graded=True) == pytest.approx((-high, -low))
    assert intervals.difference_interval([0.3, 0.8] * n, [0.2, 0.7] * n, graded=True)[0] < 0.09
    assert intervals.difference_interval([80.0] * n, [70.0] * n, graded=True) == (10, 10)


def test_the_mean_difference_weighs_tasks_alike() -> None:
    assert intervals.mean_difference([(1.0, 0.7, 1.0), (0.0, -0.4, 0.4)]) == pytest.approx(
        (0.5, 0.5 - 0.25, 0.5 + 0.2)
    )
    assert intervals.mean_difference([(0.3, 0.1, 0.6)]) == pytest.approx((0.3, 0.1, 0.6))


def test_a_difference_of_rounding_is_none_and_has_no_sign() -> None:
    """`-0.000` in a table would be a loss where both systems have the same answers right."""
    for ours, theirs in ((0.3, 0.1 + 0.2), (0.1 + 0.2, 0.3)):
        assert f"{intervals.difference(ours, theirs):+.3f}" == "+0.000"
    assert intervals.difference(0.3, 0.31) == 0.3 - 0.31
    opposite = [(0.1 + 0.2 - 0.3, -0.1, 0.1), (0.0, -0.1, 0.1)]
    assert intervals.mean_difference(opposite)[0] == 0


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5
    )
)
def test_the_interval_of_a_mean_difference_holds_it_and_has_a_width(
    tasks: list[tuple[int, int, int]],
) -> None:
    """Where no row of a task differs, too."""
    found = []
    for same, better, worse in tasks:
        ours = [0.0] * same + [1.0] * better + [0.0] * worse
        theirs = [0.0] * same + [0.0] * better + [1.0] * worse
        apart = (better - worse) / len(ours)
        found.append((apart, *intervals.difference_interval(ours, theirs, graded=False)))
    mean, low, high = intervals.mean_difference(found)
    assert low < mean < high


def test_holm_corrects_as_in_his_example() -> None:
    assert intervals.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert intervals.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_a_corrected_p_is_never_smaller_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = intervals.holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, corrected, strict=True))
    pairs = sorted(zip(p_values, corrected, strict=True))
    assert [after for _, after in pairs] == sorted(after for _, after in pairs)


def test_the_standard_error_is_that_of_a_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    assert intervals.standard_error(values) == pytest.approx(stats.sem(values))
    assert intervals.standard_error([1.0]) == 0
