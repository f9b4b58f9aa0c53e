"""The lineage of a checkpoint as a graph: base and adapters, then the artifacts made of them.

    base       ─┐
    adapter 1  ─┼▶ stack ─▶ router ─▶ checkpoint ─▶ scores
    adapter 2  ─┘

On a phone the four boxes stand below each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.path import Path

from meteora.untrusted.findings import counted, shortened
from pipelines.reports.queries import QueryResult, base_name
from pipelines.reports.svg import ACCENT, INK, NARROW, RULE, SOFT, draw_wide_and_narrow, new_axes

MOST = 14
"""The most lines for adapters; if there are more, the last line has the number of the others."""
LINE, BOX, GAP = 23, 58, 26
"""Heights of an adapter and of a box, and the space between boxes, in CSS pixels."""
DIGITS = 12
"""The digits of an id to show."""


@dataclass(frozen=True)
class Box:
    """A rectangle with lines of text, the first one bold; in CSS pixels from the left and top."""

    lines: Sequence[str]
    left: float
    top: float
    width: float
    height: float

    def at(self, side: str) -> tuple[float, float]:
        """The middle of a side: `left`, `right`, `top` or `bottom`."""
        across = {"left": 0.0, "right": 1.0}.get(side, 0.5)
        down = {"top": 0.0, "bottom": 1.0}.get(side, 0.5)
        return self.left + across * self.width, self.top + down * self.height


def lineage_graph(results: Mapping[str, QueryResult]) -> Markup:
    """The graph of one routed model, from the results of a report's queries."""
    sources = [f"base  {base_name(results)}"]
    names = [f"{row['number']}  {row['name']}" for row in results["experts"].rows]
    kept = names if len(names) <= MOST else names[: MOST - 1]
    sources += [*kept, *([f"and {len(names) - len(kept)} more"] if len(kept) < len(names) else [])]
    made = results["lineage"].rows
    before = [row for row in made if row["kind"] == "router" and row["depth"] == 1]
    sources += [f"router {_digest(row)}, before" for row in before]
    chain = _chain(results)

    def draw(width: int) -> Figure:
        tall = width == NARROW
        first = 205 if tall else 190
        boxes = len(chain)
        high = len(sources) * LINE
        deep = boxes * BOX + (boxes - 1) * GAP if tall else BOX
        height = max(high, deep)
        size = width - first - 40 if tall else (width - first - boxes * GAP) / boxes
        items = [
            Box([text], 0, (height - high) / 2 * (not tall) + i * LINE + 1, first, LINE - 4)
            for i, text in enumerate(sources)
        ]
        steps = [
            Box(
                lines,
                width - size if tall else first + GAP + i * (size + GAP),
                i * (BOX + GAP) if tall else (height - BOX) / 2,
                size,
                BOX,
            )
            for i, lines in enumerate(chain)
        ]
        figure, axes = new_axes(width, height, left=1, top=2, bottom=2, right=1)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        for number, box in enumerate((*items, *steps)):
            _draw_box(axes, box, number, small=number < len(items))
        ends = [steps[1] if i >= len(items) - len(before) else steps[0] for i in range(len(items))]
        for number, (item, end) in enumerate(zip(items, ends, strict=True)):
            # the line of an earlier router passes the stack, to the lower side
            side = "bottom" if end is steps[1] and not tall else "left"
            _draw_edge(axes, item.at("right"), end.at(side), number, upward=side == "bottom")
        for number, (one, other) in enumerate(pairwise(steps), len(items)):
            sides = ("bottom", "top") if tall else ("right", "left")
            _draw_edge(axes, one.at(sides[0]), other.at(sides[1]), number)
        return figure

    return draw_wide_and_narrow(draw, "lineage-graph")


def _chain(results: Mapping[str, QueryResult]) -> list[list[str]]:
    """The lines of each box."""
    made = results["lineage"].rows
    itself = next(row for row in made if row["depth"] == 0)
    stack = next((row for row in made if row["kind"] == "fused" and row["depth"] == 1), None)
    router = results["router"].rows[0]
    tasks = {row["task"] for row in results["scores"].rows if row["system"] == "fused"}
    means = [f"mean {row['mean']:.3f}" for row in results["means"].rows if row["system"] == "fused"]
    return [
        ["stack", _digest(stack) if stack else "", counted(len(results["experts"].rows), "expert")],
        ["router", _digest(itself), f"{router['router']}, top-{router['top_k']}"],
        ["checkpoint", f"{itself['recorded_at']:%Y-%m-%d}", "experts, gates"],
        ["scores", counted(len(tasks), "task"), *means],
    ]


def _digest(row: Mapping[str, Any]) -> str:
    return str(row["id"]).partition(":")[2][:DIGITS]


def _draw_box(axes: Axes, box: Box, number: int, *, small: bool) -> None:
    axes.add_patch(
        Rectangle(
            (box.left, box.top), box.width, box.height, facecolor="none",
            edgecolor=RULE if small else ACCENT, linewidth=1, gid=f"node-{number}",
        )
    )  # fmt: skip
    room = int((box.width - 12) / 6.4)
    for i, text in enumerate(box.lines):
        axes.text(
            box.left + 7, box.top + (box.height / 2 if small else 13 + 16 * i),
            shortened(text, room), fontsize=11, va="center_baseline",
            color=INK if small or i == 0 else SOFT,
            fontweight="normal" if small or i else "bold",
        )  # fmt: skip


def _draw_edge(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    number: int,
    *,
    upward: bool = False,
) -> None:
    """A curve with an arrow at its end; it arrives from the left, or from below if `upward`."""
    (x, y), (to_x, to_y) = start, end
    middle = (x + to_x) / 2
    bends = [(middle, y), (to_x, y) if upward else (middle, to_y)]
    path = Path([start, end] if x == to_x else [start, *bends, end])
    path.codes = [Path.MOVETO, *([Path.LINETO] if x == to_x else [Path.CURVE4] * 3)]
    axes.add_patch(
        FancyArrowPatch(
            path=path, arrowstyle="-|>", mutation_scale=8, color=SOFT, linewidth=1,
            shrinkA=0, shrinkB=0, gid=f"edge-{number}",
        )
    )  # fmt: skip
