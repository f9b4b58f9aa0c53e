"""A trace as people see it: coloured text in a terminal, and one HTML file that needs nothing."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from pipelines.reports import palette
from pipelines.reports.html import render

if TYPE_CHECKING:
    from torch import Tensor

    from meteora.model.trace import Trace


CONTROLS = {code: 0x2400 + code for code in range(32) if code != ord("\n")} | {0x7F: 0x2421}
"""Control characters as the pictures of them: what a model says moves no cursor."""


@dataclass(frozen=True)
class Token:
    """One token, and the expert that won it over all layers."""

    text: str
    expert: int
    share: float
    """Mean weight of that expert over all routed modules, 0 to 1."""


def tokens(trace: Trace) -> list[Token]:
    share, expert = trace.shares().max(dim=1)
    return [
        Token(*found) for found in zip(trace.pieces, expert.tolist(), share.tolist(), strict=True)
    ]


def terminal(trace: Trace) -> list[Text]:
    """Prompt, answer and legend; a number marks where another expert takes over."""
    found = tokens(trace)
    parts = found[: trace.num_prompt], found[trace.num_prompt :]
    texts = [_coloured(part) for part in parts if part]
    return [*texts, _legend(trace, found)]


def _coloured(part: list[Token]) -> Text:
    out, before = Text(), -1
    for token in part:
        if token.expert != before:
            out.append(f"[{token.expert + 1}]", style="dim")
        before = token.expert
        text = token.text.translate(CONTROLS)
        out.append(text, style=f"black on {palette.tint(token.expert, token.share)}")
    return out


def _legend(trace: Trace, found: list[Token]) -> Text:
    won = [sum(token.expert == e for token in found) for e in range(len(trace.experts))]
    out = Text()
    for e in sorted(range(len(won)), key=lambda e: -won[e]):
        if won[e]:
            out.append(f"[{e + 1}]", style="dim")
            name = trace.experts[e].translate(CONTROLS)
            out.append(f" {name} ", style=f"black on {palette.tint(e, 0.8)}")
            out.append(f" {won[e] / len(found):.0%} of {len(found)} tokens\n")
    out.rstrip()
    return out


def figure(trace: Trace, name: str, caption: str = "") -> dict[str, Any]:
    """What the template draws: the tokens as they stand over all layers, and data for the rest.

    Args:
        name: tells this figure from others on the same page
    """
    found = tokens(trace)
    return {
        "name": name,
        "caption": caption,
        "asked": found[: trace.num_prompt],
        "answered": found[trace.num_prompt :],
        "experts": trace.experts,
        "won": [sum(token.expert == e for token in found) for e in range(len(trace.experts))],
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
    """Module by module and token by token, in the bytes that a typed array reads."""
    return base64.b64encode(numbers.contiguous().numpy().tobytes()).decode()


def page(trace: Trace, title: str) -> str:
    """One self-contained file."""
    context = {
        "title": title,
        "trace": figure(trace, "trace"),
        "num_colours": len(trace.experts),
        "scripts": ["trace.js"],
    }
    return render("trace.html", context)
