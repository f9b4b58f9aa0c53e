"""Whether the adapters' licences allow publishing a model made of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection
from typing import TYPE_CHECKING

from meteora.artifacts import MeteoraError
from meteora.base.sources import PATH

if TYPE_CHECKING:
    from meteora.checkpoint.manifest import Manifest

NOT_STATED = "none"
"""The name by which adapters without a licence are allowed."""
NO_DERIVATIVES = re.compile(
    r"(?<![^\W_])(cc)?(by)?(nc)?nd(?![^\W\d_])|non?[\W_]*deriv", re.IGNORECASE
)
"""In identifiers and in people's own words: `ND`, `BYNCND`, `NoDerivatives`, `non-derivative`."""
NOT_A_LICENCE = {
    "unknown", "other", "unlicensed", "proprietary", "all-rights-reserved", "none", "none-stated",
    "no", "no-licence", "no-license", "n/a",
}  # fmt: skip
"""Words on cards that are no licence."""


class LicenceError(MeteoraError):
    """An adapter's licence forbids the publication of a model made of it."""


def refuse_forbidden(manifest: Manifest, allowed: Collection[str] = ()) -> None:
    """Refuse to publish adapters of the Hub whose licence forbids it, or that state none.

    A local folder without a licence counts as the user's own.

    Args:
        allowed: licences that are accepted all the same; `none`: also adapters that state none

    Raises:
        LicenceError: Some adapters may not be published, each with its licence.
    """
    found = {
        expert.name: reason
        for expert in manifest.experts
        if (reason := _reason(expert.licence, expert.source))
        and reason.lower() not in {name.lower() for name in allowed}
    }
    if found:
        listed = ", ".join(
            f"{name} ({'no licence stated' if reason == NOT_STATED else reason})"
            for name, reason in found.items()
        )
        reasons = sorted({*found.values()})
        words = " ".join(f"--allow-licence {shlex.quote(reason)}" for reason in reasons)
        raise LicenceError(
            f"the licences of {listed} do not allow publishing the adapters in another model;"
            f" leave them out, ask their owners, or, if you have permission, publish with {words}"
            " (`publish.allow_licences` in a recipe)"
        )


def _reason(licence: str, source: str) -> str:
    """The licence that forbids publication; empty if none does."""
    if not licence:
        return "" if source.startswith(PATH) else NOT_STATED
    each = {one.strip().lower().replace(" ", "-") for one in licence.split(",")}
    return licence if NO_DERIVATIVES.search(licence) or each & NOT_A_LICENCE else ""
