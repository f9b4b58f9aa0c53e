"""Matplotlib figures as SVG inside a page, with the page's fonts and colours.

Figures are drawn in placeholder colours. Each is then replaced by a CSS variable, so one drawing
serves the light and the dark theme. Every figure is drawn twice, for a wide page and for a phone:
if one drawing were scaled down, its text would be too small to read.
"""

import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, SOFT, RULE, ACCENT, SECOND, PAPER = (f"#0a0b0{i}" for i in range(6))
"""Placeholder colours; see VARIABLES."""
VARIABLES = {
    INK: "--ink", SOFT: "--soft", RULE: "--rule", ACCENT: "--accent", SECOND: "--second",
    PAPER: "--paper",
}  # fmt: skip
"""The CSS variable of each placeholder colour."""
WIDE, NARROW = 720, 358
"""Widths in CSS pixels: of the text on a large screen, and on a phone that is 390 wide."""
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
TAG = re.compile(r"<[^>]*>")
"""A tag of SVG; matplotlib escapes angle brackets in texts."""
NUMBERED_ID = re.compile(r' id="[\w.]+_\d+"')
"""Matplotlib's own ids of groups: equal in all figures, and nothing refers to them."""
MARK_ID = re.compile(r'<g id="([a-z]+-\d+(?:-\d+)?)"')
"""Our own ids of marks, such as `point-0-1`: equal in all figures, but a page needs unique ids."""
FONT = re.compile(r"font: ([\d.]+px)[^;\"]*|font-size: ([\d.]+px); font-family: [^;\"]*")
"""The font of a text, as matplotlib up to 3.10 writes it, and as later versions do."""
NO_TURN = re.compile(r' transform="rotate\(-?0 [^)]*\)"')
LONG_NUMBER = re.compile(r"(\d+\.\d{3})\d+")
EMPTY = re.compile(r"\s*<g/>|\s*<g>\s*</g>")
INDENT = re.compile(r"\n\s+")
LEGEND_ROW = 18
"""Height of a row of a legend, in CSS pixels."""


@dataclass(frozen=True)
class Mark:
    """The mark of one system in a chart."""

    colour: str
    """One of the placeholder colours."""
    shape: str
    """The name of a marker in matplotlib."""
    size: float
    filled: bool

    @property
    def style(self) -> dict[str, Any]:
        """The properties of a point in matplotlib."""
        return {
            "marker": self.shape, "color": self.colour, "linestyle": "", "markersize": self.size,
            "markeredgewidth": 1.4, "markerfacecolor": self.colour if self.filled else PAPER,
        }  # fmt: skip


def new_axes(
    width: int, height: float, *, left: float, top: float, bottom: float, right: float
) -> tuple[Figure, Axes]:
    """A figure of this width, and axes of this height inside margins, all in CSS pixels."""
    total = height + top + bottom
    figure = Figure(figsize=(width / 72, total / 72), dpi=72)
    box = (left / width, bottom / total, (width - left - right) / width, height / total)
    return figure, figure.add_axes(box)


def draw_point(axes: Axes, x: float, y: float, mark: Mark) -> Line2D:
    """Draw one point, in the coordinates of the data."""
    (drawn,) = axes.plot([x], [y], **mark.style, clip_on=False)
    return drawn


def draw_legend(figure: Figure, entries: Mapping[str, Mark], left: float) -> None:
    """Draw a legend above the axes, from `left` in CSS pixels."""
    width, height = (size * 72 for size in figure.get_size_inches())
    places = legend_places(entries, left, width)
    for (text, mark), (x, row) in zip(entries.items(), places, strict=True):
        y = 1 - (10 + LEGEND_ROW * row) / height
        figure.text((x + 12) / width, y, text, fontsize=11, color=SOFT, va="center")
        figure.add_artist(Line2D([(x + 3) / width], [y], **mark.style))


def legend_places(texts: Iterable[str], left: float, width: float) -> list[tuple[float, int]]:
    """Where each entry of a legend begins: in CSS pixels from the left, and in which row."""
    places, x, row = [], left, 0
    for text in texts:
        needed = 30 + 6.4 * len(text)
        if x > left and x + needed > width:
            x, row = left, row + 1
        places.append((x, row))
        x += needed
    return places


def draw_wide_and_narrow(draw: Callable[[int], Figure], name: str) -> Markup:
    """Two SVG elements, a wide and a narrow one; the style sheet shows one of them.

    Args:
        draw: makes the figure, given its width in CSS pixels
        name: the start of the HTML ids in the drawing; unique on a page
    """
    with mpl.rc_context(STYLE):  # ty: ignore[invalid-argument-type]
        return Markup("\n").join(
            _svg(draw(width), f"{name}-{kind}", kind)
            for width, kind in ((WIDE, "wide"), (NARROW, "narrow"))
        )


def _svg(figure: Figure, name: str, kind: str) -> Markup:
    """The SVG element of a figure, in the page's colours and fonts.

    A screen reader passes over it: the caption and a table beside it say the same.
    """
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # so that ids differ between figures
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=no_metadata)
    text = file.getvalue()
    text = TAG.sub(_tidied, text[text.index("<svg") :])
    text = INDENT.sub("\n", EMPTY.sub("", text))
    width, height = (round(size * 72) for size in figure.get_size_inches())
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    head = f'<svg class="{kind}" {size} aria-hidden="true"'
    # safe as markup: matplotlib escapes text from outside
    return Markup(re.sub(r"<svg[^>]*", head, text, count=1))  # noqa: S704


def _tidied(tag: re.Match[str]) -> str:
    """A tag in the page's colours and font, without what makes pages large."""
    text = tag[0]
    for placeholder, variable in VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    # not `font`, which would take back the weight that stands before it
    text = FONT.sub(lambda font: f"font-size: {font[1] or font[2]}; font-family: var(--sans)", text)
    text = MARK_ID.sub(r'<g class="\1"', NUMBERED_ID.sub("", text))
    return LONG_NUMBER.sub(r"\1", NO_TURN.sub("", text))
