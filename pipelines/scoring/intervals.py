"""How far a number can be trusted, and when two may be called different.

One method a kind of metric, recorded with each score: Wilson's interval where a row is right or
wrong, since a bootstrap has no width at 0 and at 1; a bootstrap where a row may be partly right.
Differences are tested in pairs, on the same rows: exactly (McNemar) or by flipping signs.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: two sides make 95 %."""
RESAMPLES = 9_999


def wilson(successes: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927); a bootstrap fails at 0 and at 1."""
    share = successes / total
    scale = 1 + Z95**2 / total
    centre = (share + Z95**2 / (2 * total)) / scale
    half = Z95 / scale * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean over rows, by 9,999 resamples (percentiles).

    Where all rows have one value, resampling them says nothing; values between 0 and 1 vary at
    most as much as right and wrong do, so Wilson's interval then holds and errs on the wide side.
    """
    if min(values) == max(values):
        return wilson(sum(values), len(values))
    return _percentiles(_resampled(values, seed))


def _resampled(values: Sequence[float] | np.ndarray, seed: int) -> np.ndarray:
    """The means of as many resamples of the rows."""
    rng = np.random.default_rng(seed)
    rows = np.asarray(values)
    step = max(1, RESAMPLES * 100 // len(rows))  # so many at a time, or their indices fill memory
    sizes = [min(step, RESAMPLES - done) for done in range(0, RESAMPLES, step)]
    drawn = (rng.integers(len(rows), size=(size, len(rows))) for size in sizes)
    return np.concatenate([rows[chosen].mean(axis=1) for chosen in drawn])


def _percentiles(means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_median(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a median, by 9,999 resamples: for times, which have outliers."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.asarray(values), size=(RESAMPLES, len(values)))
    return _percentiles(np.median(drawn, axis=1))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: the rows' standard deviation (n - 1) over the root of their number."""
    n = len(values)
    if n < 2:
        return 0.0
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The exact two-sided p of rows that are right or wrong: only those that differ count."""
    better = sum(a > b for a, b in zip(ours, theirs, strict=True))
    worse = sum(a < b for a, b in zip(ours, theirs, strict=True))
    if better + worse == 0:
        return 1.0
    from scipy.stats import binomtest  # noqa: PLC0415  (of comparisons alone)

    return float(binomtest(min(better, worse), better + worse).pvalue)


def sign_flip(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> float:
    """The two-sided p of a mean difference: how often random signs come as far from zero.

    Exact where there are few rows, by 9,999 seeded draws elsewhere.
    """
    apart = np.subtract(ours, theirs)
    apart = apart[apart != 0]
    if not len(apart):
        return 1.0
    from scipy.stats import permutation_test  # noqa: PLC0415  (of comparisons alone)

    found = permutation_test(
        (apart,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
        vectorized=True,
    )
    return float(found.pvalue)


def difference(
    ours: Sequence[float], theirs: Sequence[float], *, graded: bool, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a mean difference over the same rows.

    Right or wrong: Wald's interval with half a row added to each of the four cells (Agresti and
    Min 2005), which keeps its width where no row differs. Graded: by bootstrap over the rows.
    """
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    if graded and min(apart) != max(apart):
        return _percentiles(_resampled(apart, seed))
    better = sum(value > 0 for value in apart) + 0.5
    worse = sum(value < 0 for value in apart) + 0.5
    n = len(apart) + 2
    centre = (better - worse) / n
    half = Z95 * math.sqrt(better + worse - (better - worse) ** 2 / n) / n
    return max(-1.0, centre - half), min(1.0, centre + half)


def mean_difference(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0
) -> tuple[float, float, float]:
    """The mean over tasks of their differences, and its 95 % interval.

    The rows of each task are resampled on their own; the tasks stay as they are, so it speaks of
    these tasks and no others.
    """
    apart = [np.subtract(ours, theirs) for ours, theirs in pairs]
    seeds = random.Random(seed)  # noqa: S311  (resampling, no secret)
    means = np.mean([_resampled(rows, seeds.getrandbits(32)) for rows in apart], axis=0)
    return (float(np.mean([rows.mean() for rows in apart])), *_percentiles(means))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected over a family, so that one false alarm in it stays as rare (Holm 1979)."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    so_far = 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = so_far
    return corrected
