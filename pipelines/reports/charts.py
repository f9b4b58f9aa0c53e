"""The charts of a report: forest plot, heat map, line chart, dumbbell plot.

The `name` of a chart is the start of its HTML ids: unique on a page.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from meteora.untrusted.findings import shortened
from pipelines.reports.svg import (
    ACCENT,
    INK,
    LEGEND_ROW,
    NARROW,
    PAPER,
    RULE,
    SECOND,
    SOFT,
    WIDE,
    Mark,
    draw_legend,
    draw_point,
    draw_wide_and_narrow,
    legend_places,
    new_axes,
)

UPRIGHT = 26
"""Below this width in pixels, columns have vertical names: diagonal names would touch."""
LONGEST = 24
"""The most characters of a name in a chart."""
NUMBERED = 16
"""The most columns of a heat map with numbers in its cells."""
MARKS = {
    "fused": Mark(ACCENT, "o", 7, filled=True),
    "oracle": Mark(SECOND, "D", 6, filled=False),
    "base": Mark(INK, "|", 9, filled=True),
    "A": Mark(SECOND, "D", 6, filled=False),
    "B": Mark(ACCENT, "o", 7, filled=True),
    "B minus A": Mark(ACCENT, "o", 7, filled=True),
}
"""The marks of some systems, and of the two checkpoints of a page on both."""
DASHES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
"""The dashes of thin lines, in their order; they distinguish lines of one colour."""
FEW = 5
"""A forest plot with more systems has its lines closer together."""
OTHERS = [Mark(SOFT, shape, 5.5, filled=False) for shape in "^vsPX<>*"]
"""Marks of the other systems, in their order."""


def name_in_chart(name: str, most: int = LONGEST) -> str:
    """A name cut in the middle to `most` characters: long names often differ at their end."""
    plain = shortened(name, len(name))
    end = most // 2
    return plain if len(plain) <= most else f"{plain[: most - end - 1]}…{plain[-end:]}"


def forest_plot(
    scores: Sequence[Mapping[str, Any]], xlabel: str, name: str, *, signed: bool
) -> Markup:
    """Scores with their intervals: a block for each task, in it a line for each system.

    Args:
        scores: task, system, value, low and high of each
        signed: whether the values are differences; then the plot has a line at zero
    """
    systems = list(dict.fromkeys(score["system"] for score in scores))
    tasks = list(dict.fromkeys(score["task"] for score in scores))
    names = [name_in_chart(task) for task in tasks]
    others = iter(OTHERS * len(systems))
    drawn = {system: MARKS.get(system) or next(others) for system in systems}
    gap, line = 1.6, 13.0 if len(systems) <= FEW else 9.5
    height = len(tasks) * (len(systems) + gap) * line

    def draw(width: int) -> Figure:
        left = 12 if width == NARROW else 14 + 7 * max(map(len, names))
        top = 14 + LEGEND_ROW * (1 + legend_places(systems, left, width)[-1][1])
        figure, axes = new_axes(width, height, left=left, top=top, bottom=42, right=12)
        draw_legend(figure, drawn, left)
        for i, task in enumerate(tasks):
            top = i * (len(systems) + gap)
            if i:
                axes.axhline(top - 0.5 * gap - 0.1, color=RULE, linewidth=0.8)
            if width == NARROW:
                axes.text(
                    0.02, top - 0.42, name_in_chart(task, 40), fontsize=11.5, fontweight="bold",
                    va="center", transform=axes.get_yaxis_transform(),
                )  # fmt: skip
            for score in scores:
                if score["task"] == task:
                    mark, place = drawn[score["system"]], systems.index(score["system"])
                    y, thick = top + place + 0.35, 2.4 if mark.colour == ACCENT else 1.2
                    axes.plot(
                        [score["low"], score["high"]], [y, y], color=mark.colour, linewidth=thick,
                        solid_capstyle="butt", gid=f"interval-{i}-{place}",
                    )  # fmt: skip
                    draw_point(axes, score["value"], y, mark).set_gid(f"point-{i}-{place}")
        axes.set_ylim(len(tasks) * (len(systems) + gap) - 0.5 * gap, -0.5 * gap - 0.1)
        if width == NARROW:
            axes.set_yticks([])
        else:
            middle = [i * (len(systems) + gap) + len(systems) / 2 - 0.15 for i in range(len(tasks))]
            axes.set_yticks(middle, names)
        low, high = min(one["low"] for one in scores), max(one["high"] for one in scores)
        if signed:
            axes.axvline(0, color=SOFT, linewidth=1)
        elif low >= 0 and high <= 1:
            axes.set_xlim(-0.02, 1.02)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(xlabel)
        axes.spines[["left", "bottom"]].set_visible(False)
        return figure

    return draw_wide_and_narrow(draw, name)


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[str, str], float],
    name: str,
    *,
    labels: tuple[str, str],
) -> Markup:
    """Shares from 0 to 1 in one hue. Cells where row and column have the same name are framed.

    Args:
        values: by row and column; a cell without a value stays empty
        labels: of the rows, and of the columns
    """

    def draw(width: int) -> Figure:
        limit = LONGEST if width == WIDE else 15
        shown_rows = [name_in_chart(row, limit) for row in rows]
        shown_columns = [name_in_chart(column, limit) for column in columns]
        left = 26 + 6.6 * max(map(len, shown_rows))
        longest = max(map(len, shown_columns))
        upright = (width - left) / len(columns) < UPRIGHT
        right = 6 if upright else 4 + 4.2 * longest  # diagonal names need room
        cell = min(46.0, (width - left - right) / len(columns))
        size = max(6.5, min(11.5, cell * 0.8))
        top = 30 + (0.6 * size if upright else 4.6) * longest
        figure, axes = new_axes(
            width, cell * len(rows), left=left, top=top, bottom=6,
            right=width - left - cell * len(columns),
        )  # fmt: skip
        for r, row in enumerate(rows):
            for c, column in enumerate(columns):
                value = values.get((row, column))
                if value is None:
                    continue
                box = Rectangle(
                    (c + 0.03, r + 0.03), 0.94, 0.94,
                    facecolor=ACCENT, alpha=0.03 + 0.97 * value, linewidth=0, gid=f"cell-{r}-{c}",
                )  # fmt: skip
                axes.add_patch(box)
                if row == column:
                    axes.add_patch(
                        Rectangle(
                            (c + 0.03, r + 0.03), 0.94, 0.94, fill=False, edgecolor=INK, linewidth=1
                        )
                    )
                if len(columns) <= NUMBERED and cell >= 22 and value >= 0.005:
                    axes.text(
                        c + 0.5, r + 0.52, f"{100 * value:.0f}", ha="center", va="center",
                        fontsize=min(11.0, cell * 0.4), color=PAPER if value > 0.55 else INK,
                    )  # fmt: skip
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows), 0)
        axes.set_yticks([r + 0.5 for r in range(len(rows))], shown_rows, fontsize=size)
        axes.xaxis.tick_top()
        axes.set_xticks(
            [c + 0.5 for c in range(len(columns))], shown_columns, fontsize=size, color=INK,
            rotation=90 if upright else 40, ha="left", rotation_mode="anchor",
            va="center" if upright else "baseline",
        )  # fmt: skip
        axes.spines[:].set_visible(False)
        axes.set_ylabel(labels[0])
        figure.text(
            left / width,
            1 - 11 / (top + 6 + cell * len(rows)),
            labels[1],
            color=SOFT,
            fontsize=11.5,
        )
        return figure

    return draw_wide_and_narrow(draw, name)


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    name: str,
    *,
    xlabel: str,
    ylabel: str,
    strong: str,
    step: bool = False,
) -> Markup:
    """One bold line of shares and thin ones, each with its name at its end.

    Args:
        series: points (x, share) by name
        strong: the name of the bold line, in the accent's colour
        step: whether a value holds until the next point
    """

    def draw(width: int) -> Figure:
        shown = {key: name_in_chart(key, LONGEST if width == WIDE else 15) for key in series}
        right = 40 + 6.2 * max(map(len, shown.values()))
        figure, axes = new_axes(width, 230, left=44, top=14, bottom=44, right=right)
        ends = []
        dashes = cycle(DASHES)
        for key, points in series.items():
            bold = key == strong
            x, y = zip(*sorted(points), strict=True)
            style: dict[str, Any] = {
                "color": ACCENT if bold else SOFT,
                "linewidth": 2.2 if bold else 1.2,
                "linestyle": "-" if bold else next(dashes),
                "zorder": 3 if bold else 2,
            }
            axes.plot(x, y, **style, drawstyle="steps-post" if step else "default")
            ends.append((y[-1], x[-1], key, style))
        low = min(y for points in series.values() for _, y in points)
        axes.set_ylim(math.floor(low * 10) / 10 - 0.02, 1.02)
        axes.set_yticks([tick for tick in axes.get_yticks() if low - 0.12 < tick <= 1])
        bottom, top = axes.get_ylim()
        place = math.inf
        first, last = axes.set_xlim(axes.get_xlim())
        sample = 26 * (last - first) / (axes.get_position().width * width)
        for y, x, key, style in sorted(ends, key=lambda end: end[:3], reverse=True):
            place = min(y, place - 14 * (top - bottom) / 230)  # names do not overlap
            axes.plot([x + 0.2 * sample, x + sample], [place, place], **style, clip_on=False)
            axes.annotate(
                shown[key], (x + sample, place), xytext=(7, 0), textcoords="offset points",
                va="center", fontsize=11, annotation_clip=False,
                color=ACCENT if key == strong else SOFT,
                fontweight="bold" if key == strong else "normal",
            )  # fmt: skip
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.tick_params(axis="y", labelcolor=SOFT, labelsize=11)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        return figure

    return draw_wide_and_narrow(draw, name)


def dumbbell_plot(
    rows: Sequence[tuple[str, float, float]], name: str, *, labels: tuple[str, str], xlabel: str
) -> Markup:
    """Two shares in each row, joined by a line: an expected one and a real one.

    Args:
        rows: name, expected share, real share
        labels: of the two shares
    """

    def draw(width: int) -> Figure:
        shown = [name_in_chart(row[0], LONGEST if width == WIDE else 15) for row in rows]
        left = 14 + 7 * max(map(len, shown))
        figure, axes = new_axes(width, 21 * len(rows), left=left, top=26, bottom=42, right=14)
        for i, (_, expected, real) in enumerate(rows):
            axes.plot([expected, real], [i, i], color=SOFT, linewidth=1.2)
            draw_point(axes, expected, i, MARKS["oracle"])
            draw_point(axes, real, i, MARKS["fused"])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        most = max(max(row[1:]) for row in rows)
        axes.set_xlim(-0.03 * most, most * 1.08)  # a mark at 0 covers no name
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= min(1, most * 1.08)])
        axes.set_yticks(range(len(rows)), shown)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="x", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(xlabel)
        axes.spines[["left", "bottom"]].set_visible(False)
        draw_legend(figure, {labels[0]: MARKS["oracle"], labels[1]: MARKS["fused"]}, left)
        return figure

    return draw_wide_and_narrow(draw, name)
