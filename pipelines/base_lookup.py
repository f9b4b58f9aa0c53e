"""Look at the base that an adapter names: its config and tokenizer come, and are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meteora.base_match import UnreadableBaseError, compare_bases
from pipelines import hub
from pipelines.hub_errors import HubError
from pipelines.named_base import BaseVerdict, keep, kept
from pipelines.progress import say
from pipelines.sources import hub_of

if TYPE_CHECKING:
    from meteora.artifacts import BuiltBase
    from pipelines.named_base import LookUp
    from pipelines.workplace import Workplace


def looking_up(work: Workplace, built: BuiltBase) -> LookUp:
    """A function from a base's `owner/name` to what it is; each is looked up once.

    What cannot be reached is asked for again by the next run, and only then.
    """
    known: dict[str, BaseVerdict] = {}

    def look_up(named: str) -> BaseVerdict:
        if named not in known:
            verdict = kept(work.adapters_folder, built, named)
            known[named] = _ask(work, built, named) if verdict.unreachable else verdict
        return known[named]

    return look_up


def _ask(work: Workplace, built: BuiltBase, named: str) -> BaseVerdict:
    asked = hub_of(work.recipe, named)
    try:
        ref = hub.resolve(named, hub=asked)
        with work.scratch() as scratch:
            say(f"comparing {named}, which an adapter names, with the base")
            hub.download_profile(ref, scratch / "profile", hub=asked)
            found = compare_bases(named, scratch / "profile", work.base_folder(built.spec))
    except (HubError, UnreadableBaseError) as error:
        return BaseVerdict(str(error))
    verdict = BaseVerdict(refusals=tuple(found.refusals), warnings=tuple(found.warnings))
    keep(work.adapters_folder, built, named, verdict)
    return verdict
