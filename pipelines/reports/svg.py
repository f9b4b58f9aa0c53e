"""SVG that lies in a page: its text is text, its colours are the page's own.

Matplotlib draws with marker colours that no figure uses otherwise, and each is replaced by the CSS
variable that it stands for; so one drawing serves light and dark. Every figure is drawn twice, for
a wide page and for a phone, since text that shrinks with its figure cannot be read.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from matplotlib.axes import Axes

INK, SOFT, RULE, ACCENT, SECOND, PAPER = (f"#0a0b0{i}" for i in range(6))
VARIABLES = {
    INK: "--ink", SOFT: "--soft", RULE: "--rule", ACCENT: "--accent", SECOND: "--second",
    PAPER: "--paper",
}  # fmt: skip
WIDE, NARROW = 720, 358
"""Widths in CSS pixels: of the text on a large screen, and on a phone of 390."""
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 12,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.labelcolor": SOFT,
    "axes.labelsize": 11.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 11,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
NUMBERED_ID = re.compile(r' id="[\w.]+_\d+"')
"""What matplotlib calls its groups, the same in each figure; nothing refers to it."""
FONT = re.compile(r"font: ([\d.]+px)[^;\"]*|font-size: ([\d.]+px); font-family: [^;\"]*")
"""As matplotlib up to 3.10 writes it, and as later ones do."""
NO_TURN = re.compile(r' transform="rotate\(-?0 [^)]*\)"')
LONG_NUMBER = re.compile(r"(\d+\.\d{3})\d+")
EMPTY = re.compile(r"\s*<g/>|\s*<g>\s*</g>")
INDENT = re.compile(r"\n\s+")
LEGEND_ROW = 18


@dataclass(frozen=True)
class Mark:
    """How one system is drawn."""

    colour: str
    shape: str
    size: float
    filled: bool


def new_axes(
    width: int, height: float, *, left: float, top: float, bottom: float, right: float
) -> tuple[Figure, Axes]:
    """Axes of this height with margins around them, all in CSS pixels."""
    total = height + top + bottom
    figure = Figure(figsize=(width / 72, total / 72), dpi=72)
    box = (left / width, bottom / total, (width - left - right) / width, height / total)
    return figure, figure.add_axes(box)


def point(axes: Axes, x: float, y: float, mark: Mark) -> Line2D:
    (drawn,) = axes.plot(
        [x], [y], mark.shape, color=mark.colour, markersize=mark.size, markeredgewidth=1.4,
        markerfacecolor=mark.colour if mark.filled else PAPER, clip_on=False,
    )  # fmt: skip
    return drawn


def legend(figure: Figure, entries: Mapping[str, Mark], left: float) -> int:
    """Name the marks above the axes, in as many rows as they need; returns how many."""
    width, height = (size * 72 for size in figure.get_size_inches())
    x, row = left, 0
    for text, mark in entries.items():
        needed = 30 + 6.4 * len(text)
        if x > left and x + needed > width:
            x, row = left, row + 1
        y = 1 - (10 + LEGEND_ROW * row) / height
        figure.text((x + 12) / width, y, text, fontsize=11, color=SOFT, va="center")
        key = Line2D(
            [(x + 3) / width], [y], marker=mark.shape, color=mark.colour, linestyle="",
            markersize=mark.size, markeredgewidth=1.4,
            markerfacecolor=mark.colour if mark.filled else PAPER,
        )  # fmt: skip
        figure.add_artist(key)
        x += needed
    return row + 1


def brief(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def draw_both(draw: Callable[[int], Figure], name: str) -> Markup:
    with mpl.rc_context(STYLE):  # ty: ignore[invalid-argument-type]
        return Markup("\n").join(
            _svg(draw(width), f"{name}-{kind}", kind)
            for width, kind in ((WIDE, "wide"), (NARROW, "narrow"))
        )


def _svg(figure: Figure, name: str, kind: str) -> Markup:
    """The drawing without a file's head, in the page's colours and fonts."""
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # ids of one figure meet those of no other
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for sentinel, variable in VARIABLES.items():
        text = text.replace(sentinel, f"var({variable})")
    text = FONT.sub(lambda font: f"font: {font[1] or font[2]} var(--sans)", text)
    text = NUMBERED_ID.sub("", text)
    for waste, kept in ((NO_TURN, ""), (LONG_NUMBER, r"\1"), (EMPTY, ""), (INDENT, "\n")):
        text = waste.sub(kept, text)
    width, height = (round(size * 72) for size in figure.get_size_inches())
    head = f'<svg class="{kind}" viewBox="0 0 {width} {height}" width="{width}" role="img"'
    # matplotlib escapes the texts that it is given: the rest is its own
    return Markup(re.sub(r"<svg[^>]*", head, text, count=1))  # noqa: S704
