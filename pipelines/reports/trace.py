"""The expert of each token: as coloured text in a terminal, and as a page of HTML.

Each expert has a colour, the same in a terminal and on a page; after eight the colours repeat, with
another emphasis in a terminal and another line below the text on a page. Colour is never the only
sign: at each change of the expert the text has its number.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from meteora.untrusted.findings import for_terminal

if TYPE_CHECKING:
    from torch import Tensor

    from meteora.model.trace import Token, Trace

COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#d6c40a",
)  # fmt: skip
"""Colours that people with any colour vision tell apart (Okabe and Ito 2008; grey for black)."""
LINES = ("solid", "dashed", "dotted", "double", "wavy")
"""CSS line styles: the ninth expert has the first colour again, with the next line."""
EMPHASES = ("", "underline ", "italic ", "bold ", "bold underline ")
"""The emphases in a terminal, in place of line styles."""
NAMED = (
    "bright_blue", "yellow", "green", "magenta", "cyan", "red", "white", "bright_yellow",
)  # fmt: skip
"""The nearest colours of a terminal with few colours."""
DEPTH = 0.8
"""The share that sets the colour's depth for all tokens if a terminal has too few colours."""

LONGEST_TITLE = 200
"""The most characters of a page's title."""


def expert_styles(num_experts: int) -> list[tuple[str, str]]:
    """The colour of each expert, as `#rrggbb`, and its CSS line style."""
    return [
        (COLOURS[expert % len(COLOURS)], LINES[expert // len(COLOURS) % len(LINES)])
        for expert in range(num_experts)
    ]


def tint(expert: int, weight: float) -> str:
    """An expert's colour mixed with white for dark text on it, deeper with more weight (0 to 1)."""
    depth = 0.15 + 0.6 * weight
    value = int(COLOURS[expert % len(COLOURS)][1:], 16)
    mixed = (round(255 + depth * ((value >> shift & 255) - 255)) for shift in (16, 8, 0))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def terminal_style(expert: int, share: float, colours: str | None) -> str:
    """An expert's style, as rich reads it; the same for all its tokens if tints cannot be shown.

    Args:
        share: of a token, 0 to 1; the larger, the deeper the colour
        colours: what the terminal can show, as `Console.color_system` names it
    """
    emphasis = EMPHASES[expert // len(COLOURS) % len(EMPHASES)]
    if colours in {"standard", "windows"}:
        return f"{emphasis}black on {NAMED[expert % len(NAMED)]}"
    return f"{emphasis}black on {tint(expert, share if colours == 'truecolor' else DEPTH)}"


def terminal_texts(trace: Trace, colours: str | None) -> list[Text]:
    """Prompt, answer and legend, with a number at each change of the expert."""
    tokens = trace.tokens()
    parts = tokens[: trace.num_prompt], tokens[trace.num_prompt :]
    texts = [_coloured(part, colours) for part in parts if part]
    return [*texts, legend(trace.experts, tokens, colours)]


def _coloured(part: Sequence[Token], colours: str | None) -> Text:
    pairs = zip(part, (None, *part), strict=False)
    return Text().join(token_text(token, before, colours) for token, before in pairs)


def token_text(token: Token, before: Token | None, colours: str | None) -> Text:
    """A token in its expert's colour; behind the expert's number, if the one before had another."""
    out = Text()
    if before is None or token.expert != before.expert:
        out.append(f"[{token.expert + 1}]", style="dim")
    text = for_terminal(token.text)
    return out.append(text, style=terminal_style(token.expert, token.share, colours))


def legend(experts: Sequence[str], tokens: Sequence[Token], colours: str | None) -> Text:
    """Number, colour and name of each expert that has tokens, and how many; the most first.

    The colour has the mean depth of its tokens.
    """
    won = Counter(sorted(token.expert for token in tokens))
    out = Text()
    for e, number in won.most_common():
        out.append(f"[{e + 1}]", style="dim")
        name = for_terminal(experts[e])
        share = sum(token.share for token in tokens if token.expert == e) / number
        out.append(f" {name} ", style=terminal_style(e, share, colours))
        out.append(f" {number / len(tokens):.0%} of {len(tokens)} tokens\n")
    out.rstrip()
    return out


def trace_figure(trace: Trace, name: str, caption: str = "") -> dict[str, Any]:
    """What `trace_figure.html` needs: the tokens over all layers, and the data of each layer.

    Args:
        name: an HTML id
    """
    tokens = trace.tokens()
    won = Counter(token.expert for token in tokens)
    return {
        "name": name,
        "caption": caption,
        "asked": tokens[: trace.num_prompt],
        "answered": tokens[trace.num_prompt :],
        "experts": trace.experts,
        "won": [won[e] for e in range(len(trace.experts))],
        "last_layer": max((layer for layer in trace.layers if layer is not None), default=0),
        "data": {
            "ids": trace.ids,
            "pieces": trace.pieces,
            "experts": trace.experts,
            "modules": trace.modules,
            "layers": trace.layers,
            "choices": trace.chosen.shape[2],
            "chosen": _packed(trace.chosen.short()),
            "weights": _packed((trace.weights * 255).round().byte()),
        },
    }


def _packed(numbers: Tensor) -> str:
    """Base64 of [modules, tokens, top_k] in row-major order, which a typed array reads."""
    return base64.b64encode(numbers.contiguous().numpy().tobytes()).decode()


def trace_page(trace: Trace, title: str) -> str:
    """One self-contained HTML page with one trace, under the beginning of a title."""
    from pipelines.reports.html import render  # noqa: PLC0415  (jinja2, which a terminal never needs)

    context = {
        "title": title if len(title) <= LONGEST_TITLE else title[:LONGEST_TITLE] + "…",
        "trace": trace_figure(trace, "trace"),
        "expert_styles": expert_styles(len(trace.experts)),
        "scripts": ["trace.js"],
    }
    return render("trace.html", context)
