"""Confidence intervals of scores, and tests of whether two scores differ.

For rows that are right or wrong: Wilson's interval (a bootstrap has no width at 0 and at 1) and
McNemar's exact test. For rows that may be partly right: a bootstrap over rows, and sign flips.
Tests are paired: both systems answered the same rows.
"""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution, for two-sided 95 % intervals."""
RESAMPLES = 9_999
"""Resamples of a bootstrap, and sign flips of a test."""
ROUNDING = 1e-9
"""Values closer than this count as equal, such as 0.3 - 0.2 and 0.8 - 0.7."""


def interval_of_mean(
    values: Sequence[float], *, graded: bool, seed: int = 0
) -> tuple[str, float, float]:
    """The 95 % interval of a mean over rows: the method's name, the lower end, the upper end.

    A bootstrap's ends are percentiles of the means of 9,999 resamples. Resamples of equal rows are
    all equal: if all rows have one value between 0 and 1, the ends are Wilson's. They are at least
    wide enough: among such values with the same mean, right and wrong have the largest variance.

    Args:
        graded: whether a row may be partly right; then the method is the bootstrap
    """
    if not graded:
        return ("wilson", *wilson(sum(values), len(values)))
    smallest, largest = min(values), max(values)
    if largest - smallest > ROUNDING:
        return ("bootstrap", *_percentiles(_resampled(values, seed)))
    if not 0 <= smallest <= 1:
        return "bootstrap", smallest, largest
    return ("bootstrap", *wilson(sum(values), len(values)))


def wilson(successes: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    share = successes / total
    scale = 1 + Z95**2 / total
    centre = (share + Z95**2 / (2 * total)) / scale
    half = Z95 / scale * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2))
    low, high = min(share, centre - half), max(share, centre + half)  # rounding can exclude `share`
    return max(0.0, low), min(1.0, high)


def _resampled(values: Sequence[float] | np.ndarray, seed: int) -> np.ndarray:
    """The means of `RESAMPLES` resamples of the rows."""
    rng = np.random.default_rng(seed)
    rows = np.asarray(values)
    # in steps: the indices of all resamples at once would fill the memory
    step = max(1, RESAMPLES * 100 // len(rows))
    sizes = [min(step, RESAMPLES - done) for done in range(0, RESAMPLES, step)]
    drawn = (rng.integers(len(rows), size=(size, len(rows))) for size in sizes)
    return np.concatenate([rows[chosen].mean(axis=1) for chosen in drawn])


def _percentiles(means: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a median, for times, which have outliers.

    Its ends are two of the values: as each is above the median with a chance of one half, binomial
    quantiles say which (Conover 1999, section 3.2). Fewer than six values have no such interval:
    then it is that from the smallest to the largest.
    """
    from scipy.stats import binom  # noqa: PLC0415  (slow to import; only timing needs it)

    in_order = sorted(values)
    left_out = max(0, int(binom.ppf(0.025, len(values), 0.5)) - 1)  # at each end
    return in_order[left_out], in_order[-1 - left_out]


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean: the sample standard deviation over √n; 0 for one row."""
    n = len(values)
    return float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else 0.0


def are_graded(*values: Sequence[float]) -> bool:
    """Whether a row of any of these may be partly right."""
    return any(not set(rows) <= {0.0, 1.0} for rows in values)


def paired_p(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> float:
    """The two-sided p of a mean difference over the same rows: by sign flips, or McNemar's."""
    return sign_flip(ours, theirs, seed) if are_graded(ours, theirs) else mcnemar(ours, theirs)


def mcnemar(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """McNemar's exact two-sided p for rows that are right (1) or wrong (0) in two systems."""
    better = sum(a > b for a, b in zip(ours, theirs, strict=True))
    worse = sum(a < b for a, b in zip(ours, theirs, strict=True))
    if better + worse == 0:
        return 1.0
    from scipy.stats import binomtest  # noqa: PLC0415  (slow to import; only comparisons need it)

    return float(binomtest(min(better, worse), better + worse).pvalue)


def sign_flip(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> float:
    """The two-sided p of a mean difference, by a permutation test that flips signs at random.

    Exact for few rows; for more rows by 9,999 seeded draws.
    """
    apart = np.subtract(ours, theirs)
    apart = apart[np.abs(apart) > ROUNDING]
    if len(apart) < 2:  # either sign of a single difference is equally extreme
        return 1.0
    from scipy.stats import permutation_test  # noqa: PLC0415  (as above)

    result = permutation_test(
        (apart,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        rng=np.random.default_rng(seed),
        vectorized=True,
        batch=max(1, 1_000_000 // len(apart)),  # all at once would fill the memory
    )
    return float(result.pvalue)


def difference(ours: float, theirs: float) -> float:
    """Ours less theirs; 0 if only the rounding of sums is between them."""
    apart = ours - theirs
    return apart if abs(apart) > ROUNDING else 0.0


def difference_interval(
    ours: Sequence[float], theirs: Sequence[float], *, graded: bool, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a mean difference over the same rows.

    Args:
        graded: whether rows may be partly right: then by bootstrap over the rows. Otherwise it is
            Wald's interval with half a row added to each of the four cells (Agresti and Min 2005),
            which has a width even if no row differs.

    Resamples of equal differences are all equal. So if n rows that may be partly right all differ
    by one amount, the interval is that of the rule of three (Hanley and Lippman-Hand 1983), with
    the exact bound of Clopper and Pearson (1934): as n rows did not show another amount, at most
    1 - 0.025^(1/n) of all rows have one, which at worst is -1 or 1.
    """
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    if graded:
        one = min(apart)
        if max(apart) - one > ROUNDING:
            return _percentiles(_resampled(apart, seed))
        if not -1 <= one <= 1:  # values that are no shares have no known bounds
            return one, one
        others = 1 - 0.025 ** (1 / len(apart))
        return one - others * (1 + one), one + others * (1 - one)
    better = sum(value > 0 for value in apart) + 0.5
    worse = sum(value < 0 for value in apart) + 0.5
    n = len(apart) + 2
    centre = (better - worse) / n
    half = Z95 * math.sqrt(better + worse - (better - worse) ** 2 / n) / n
    return max(-1.0, centre - half), min(1.0, centre + half)


def mean_difference(
    differences: Sequence[tuple[float, float, float]],
) -> tuple[float, float, float]:
    """The mean of the differences on several tasks, with its 95 % interval: mean, low, high.

    It combines the tasks' own intervals (MOVER, Zou and Donner 2008), so it has a width even if no
    row of a task differs. Tasks are not resampled: the interval holds for these tasks only.

    Args:
        differences: of each task, the mean difference and the ends of its 95 % interval
    """
    mean, low, high = np.asarray(differences).T
    centre, num = difference(float(mean.mean()), 0.0), len(mean)
    below, above = (float(np.linalg.norm(end - mean)) / num for end in (low, high))
    return centre, centre - below, centre + above


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for the number of tests in `p_values` (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected = [0.0] * len(p_values)
    so_far = 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = so_far
    return corrected
