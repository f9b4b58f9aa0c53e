"""One colour an expert, the same in a terminal and on a page, and never the colour alone.

Eight colours that people with any colour vision tell apart (Okabe and Ito 2008, with grey for
their black); the ninth expert takes the first again, under another kind of line.
"""

from __future__ import annotations

COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#d6c40a",
)  # fmt: skip
LINES = ("solid", "dashed", "dotted", "double", "wavy")
"""CSS line styles: forty experts before two look alike."""


def colour(expert: int) -> str:
    return COLOURS[expert % len(COLOURS)]


def line(expert: int) -> str:
    return LINES[expert // len(COLOURS) % len(LINES)]


def tint(expert: int, weight: float) -> str:
    """The colour on white paper, deeper the more weight there is: dark text stays readable."""
    depth = 0.15 + 0.6 * weight
    value = int(colour(expert)[1:], 16)
    mixed = (round(255 + depth * ((value >> shift & 255) - 255)) for shift in (16, 8, 0))
    return "#" + "".join(f"{part:02x}" for part in mixed)
