"""Look at the base that an adapter names: its config and tokenizer come, and are compared."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.admission.base_identity import BaseVerdict, keep, kept
from pipelines.hub import repositories
from pipelines.hub.errors import HubError
from pipelines.workspace.console import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from meteora.artifacts import BaseSpec
    from pipelines.admission.base_identity import LookUp
    from pipelines.hub.client import Hub


def looking_up(cache: Path, base: BaseSpec, ours: Path, hub_of: Callable[[str], Hub]) -> LookUp:
    """A function from a base's `owner/name` to what it is; each is looked up once.

    What cannot be reached is asked for again by the next run, and only then.

    Args:
        cache: The folder of downloaded adapters, which keeps what was found out.
        ours: The folder that holds config and tokenizer of `base`.
        hub_of: The Hub to ask for a repository.
    """
    known: dict[str, BaseVerdict] = {}

    def look_up(named: str) -> BaseVerdict:
        if named not in known:
            verdict = kept(cache, base, named)
            if verdict.unreachable:
                verdict = _ask(named, ours, hub_of(named))
                if not verdict.unreachable:
                    keep(cache, base, named, verdict)
            known[named] = verdict
        return known[named]

    return look_up


def _ask(named: str, ours: Path, asked: Hub) -> BaseVerdict:
    # most adapters name the base at hand, and a run's own process loads no model library
    from meteora.base.match import UnreadableBaseError, compare_bases  # noqa: PLC0415

    try:
        ref = repositories.resolve(named, hub=asked)
        with tempfile.TemporaryDirectory() as scratch:
            theirs = Path(scratch) / "profile"
            say(f"comparing {named}, which an adapter names, with the base")
            repositories.download_profile(ref, theirs, hub=asked)
            found = compare_bases(named, theirs, ours)
    except (HubError, UnreadableBaseError) as error:
        return BaseVerdict(str(error))
    return BaseVerdict(refusals=tuple(found.refusals), warnings=tuple(found.warnings))
