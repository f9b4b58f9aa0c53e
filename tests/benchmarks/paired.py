"""Two systems that were asked the same rows of one task or several."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from pipelines.scoring.intervals import are_graded, difference_interval, mean_difference

Pair = tuple["Sequence[float]", "Sequence[float]"]
"""What the rows of a task are worth: ours, and the other system's."""


def mean_score(tasks: Iterable[Sequence[float]]) -> float:
    """The mean over tasks of the mean over their rows."""
    return fmean(map(fmean, tasks))


def difference(pairs: Sequence[Pair]) -> str:
    """The mean difference over tasks, ours less the other's, with its 95 % interval."""
    mean, low, high = mean_difference(
        [
            (
                fmean(ours) - fmean(others),
                *difference_interval(ours, others, graded=are_graded(ours, others)),
            )
            for ours, others in pairs
        ]
    )
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
