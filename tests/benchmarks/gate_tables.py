"""The tables of `tests.benchmarks.gates`, in Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.scoring.intervals import difference_interval, mean_difference, wilson
from tests.benchmarks.timing import machine

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SYSTEMS = ("oracle", "uniform", "arrow", "norm")


def print_tables(found: Mapping[str, Any]) -> None:
    """Everything that was measured so far; `oracle` has to be among it."""
    print("\n" + "; ".join(machine().values()) + "\n")
    methods = [key for key in found if key.startswith(("calibrate", "joint")) or key in SYSTEMS]
    _rows(
        ("gates", "examples", "seconds", "tokens", "routing, all", "after opening", "score",
         "against the oracle"),
        (_method(key, found) for key in methods),
    )  # fmt: skip
    tasks = list(found["oracle"]["scores"])
    _rows(
        ("gates", *tasks),
        ([key, *(_score(found[key]["scores"][task]) for task in tasks)] for key in methods),
    )
    others = [key for key in found if key.startswith(("top-2", "share", "null"))]
    _rows(
        ("option", "routing, after opening", "score", "against the oracle", "prefill", "decode"),
        (
            [key, f"{found[key]['routing']['after']:.3f}", *_against(found[key], found["oracle"]),
             *_speed(found[key])]
            for key in others
        ),
    )  # fmt: skip
    if "null" in found:
        one = found["null"]
        print(
            f"Base as a choice: on {one['texts']} held-out texts of no adapter the perplexity is"
            f" {one['perplexity ratio']:.4f} of the base's; AUROC {one['auroc']:.3f}; its mean"
            f" probability {one['base share outside']:.3f} there,"
            f" {one['base share inside']:.4f} on the tasks' own rows.\n"
        )
    if "grown" in found:
        _grown(found)
    if "with composites" in found:
        _rows(
            (
                "gates fitted to", "tasks a prompt", "tokens routed right",
                "answers' numbers routed right", "tokens to switch",
            ),
            (
                [
                    key, size, f"{one['accuracy']:.3f}", f"{one['openings']:.3f}",
                    f"{one['tokens to switch']:.1f}",
                ]
                for key in ("single tasks", "with composites")
                for size, one in found[key].items()
                if size.startswith("n=")
            ),
        )  # fmt: skip
        _rows(
            ("gates fitted to", "score on single tasks", "against the oracle"),
            ([key, *_against(found[key], found["oracle"])]
             for key in ("single tasks", "with composites")),
        )  # fmt: skip


def _method(key: str, found: Mapping[str, Any]) -> list[str]:
    one = found[key]
    routing = one.get("routing", {})
    return [
        key,
        str(one.get("examples", "")),
        f"{one['seconds']:.0f}" if "seconds" in one else "",
        f"{one['tokens']:,}" if "tokens" in one else "",
        *(f"{routing[part]:.3f}" if part in routing else "" for part in ("all", "after")),
        *_against(one, found["oracle"]),
    ]


def _speed(one: Mapping[str, Any]) -> list[str]:
    times = one.get("speed", {})
    return [f"{times[phase]:.2f}" if phase in times else "" for phase in ("prefill", "decode")]


def _against(one: Mapping[str, Any], oracle: Mapping[str, Any]) -> list[str]:
    pairs = [(one["scores"][task], oracle["scores"][task]) for task in one["scores"]]
    mean = sum(sum(ours) / len(ours) for ours, _ in pairs) / len(pairs)
    if one is oracle:
        return [f"{mean:.3f}", ""]
    apart, low, high = mean_difference(
        [
            (
                sum(ours) / len(ours) - sum(theirs) / len(theirs),
                *difference_interval(ours, theirs, graded=False),
            )
            for ours, theirs in pairs
        ]
    )
    return [f"{mean:.3f}", f"{apart:+.3f} [{low:+.3f}, {high:+.3f}]"]


def _score(values: list[float]) -> str:
    low, high = wilson(sum(values), len(values))
    return f"{sum(values) / len(values):.2f} [{low:.2f}, {high:.2f}]"


def _grown(found: Mapping[str, Any]) -> None:
    before, after = found["before growth"], found["grown"]
    old = list(before["scores"])
    (new,) = after["scores"].keys() - before["scores"].keys()
    was, now = (
        sum(sum(one["scores"][task]) / len(one["scores"][task]) for task in old) / len(old)
        for one in (before, after)
    )
    alone = found["oracle"]["scores"][new]
    print(
        f"Growth: {new} added to {len(old)} experts in {after['seconds']:.0f} s (all together"
        f" {before['seconds']:.0f} s). Mean score of the old tasks {was:.4f} before,"
        f" {now:.4f} after; {new} {_score(after['scores'][new])}, alone {_score(alone)}.\n"
    )


def _rows(head: tuple[str, ...], rows: Iterable[list[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "-|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()
