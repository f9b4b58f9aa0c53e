"""Why an adapter is refused, or taken with a warning."""

from __future__ import annotations

from dataclasses import dataclass

from meteora.artifacts.identity import Noun


@dataclass(frozen=True)
class Reason(Noun):
    """One of the reasons for a verdict: a code for programs, a sentence for people."""

    code: str
    """Stable, such as `dora` or `rank_mismatch`."""
    message: str
    """Which one, what it has, what is needed, what to do."""
