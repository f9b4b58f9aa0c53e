"""The page of `meteora chat --web`: a conversation in a browser, by the server's own API.

It is one file. Its policy lets a browser run the page's own script only, let that script talk to
this server only, and take no text as HTML.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence

from meteora.model.fused import check_expert
from pipelines.reports.html import render
from pipelines.reports.trace import expert_styles

POLICY = (
    "default-src 'none'; {code}; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " require-trusted-types-for 'script'"
)
"""The Content-Security-Policy of the page, which a downloaded copy of it keeps."""
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def chat_page(model: str, experts: Sequence[str], *, expert: str, max_new_tokens: int) -> str:
    """The page as HTML.

    Args:
        model: the model's name in requests
        experts: the experts, and the base, that can answer alone, in the order of their colours
        expert: the one that answers at first; empty for the fused model

    Raises:
        UnknownExpertError: `expert` is none of the experts.
    """
    if expert:
        check_expert(expert, experts)
    state = {
        "model": model,
        "experts": list(experts),
        "expert": expert,
        "max_tokens": max_new_tokens,
        "turns": [],
    }
    context = {
        "title": f"Chat with {model}",
        "state": state,
        "expert_styles": expert_styles(len(experts)),
        "scripts": ["chat.js"],
    }
    code = _hashes(render("chat.html", {**context, "policy": ""}))
    return render("chat.html", {**context, "policy": POLICY.format(code=code)})


def _hashes(html: str) -> str:
    """The part of a policy that allows the scripts and styles of a page, and no others."""
    allowed = []
    for tag in ("script", "style"):
        (code,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        allowed.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(allowed)
