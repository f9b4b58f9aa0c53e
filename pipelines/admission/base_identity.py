"""Is the base that an adapter names the base of the recipe?

Names alone decide nothing: a mirror, a quantised copy or a renamed repository is the same base, and
a base with the same shapes may be a different one. So config and tokenizer of the named base are
fetched and compared. The verdict is saved: a finished run is then known to be finished without
a request to the Hub.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora.adapters.compatibility import IncompatibleAdaptersError
from meteora.artifacts import COMMIT, REPO_ID, Noun, Reason, canonical_json, canonical_sha256
from meteora.base.sources import PATH
from meteora.base.temporary_folder import temporary_folder
from meteora.untrusted.findings import brief, shortened
from pipelines.hub import repositories
from pipelines.hub.card import base_of
from pipelines.hub.client import Hub, hub_of
from pipelines.hub.errors import HubError
from pipelines.hub.snapshot import write_note
from pipelines.processes import isolated
from pipelines.processes.child import ChildError
from pipelines.workspace.console import say
from store.files import read_note

if TYPE_CHECKING:
    from meteora.adapters.tensors import Adapter
    from meteora.artifacts import AdapterRef, BaseSpec
    from pipelines.recipe.recipe import PolicySection
    from pipelines.workspace.context import RunContext

LookUp = Callable[[str], "BaseVerdict"]
"""Takes a base's `owner/name`, and returns the verdict on it."""
COMPARE_SECONDS = 300
"""For a comparison; most of the time goes to loading the libraries."""


@dataclass(frozen=True)
class BaseVerdict(Noun):
    """How the base that an adapter names compares with ours."""

    unreachable: str = ""
    """Why the comparison was impossible; empty after a comparison."""
    refusals: tuple[Reason, ...] = ()
    warnings: tuple[Reason, ...] = ()


def identify_base(
    adapter: Adapter,
    folder: Path,
    ref: AdapterRef,
    base: BaseSpec,
    policy: PolicySection,
    look_up: LookUp,
) -> tuple[Reason, ...]:
    """Warnings about the base that an adapter names.

    The named base is looked up if the adapter or our base is from the Hub, and always under
    `unreachable_base: refuse`.

    Args:
        folder: The adapter's folder; its card may name a base if its config names none.
        base: Our base.

    Raises:
        IncompatibleAdaptersError: It is a different base. Or no comparison is possible, and the
            policy refuses such adapters.
    """
    named = _named_base(adapter, folder)
    if named and named.lower() == base.base_model.lower():
        return ()
    strict = policy.unreachable_base == "refuse"
    on_the_hub = COMMIT.fullmatch(ref.revision) or COMMIT.fullmatch(base.base_revision)
    if named and (strict or on_the_hub):
        verdict = look_up(named)
    else:
        verdict = BaseVerdict("it names none that the Hub could have")
    if verdict.refusals:
        raise IncompatibleAdaptersError(str(folder), verdict.refusals)
    if not verdict.unreachable:
        return verdict.warnings
    if strict:
        name = named or adapter.spec.base_model or "its base"
        reason = Reason(
            "base_unreachable",
            f"{name} cannot be compared with the base of this run ({verdict.unreachable}), and"
            " the policy `unreachable_base: refuse` asks for that; set it to `warn`, or leave the"
            " adapter out",
        )
        raise IncompatibleAdaptersError(str(folder), (reason,))
    if not named:
        return ()  # another warning says that no base is named, or that only shapes were compared
    if not on_the_hub:
        return _compare_names(named, base)
    return (
        Reason(
            "base_unreachable",
            f"it was trained on {named}, which cannot be compared with the base of this run"
            f" ({verdict.unreachable}); only its shapes are known to fit",
        ),
    )


def _compare_names(named: str, base: BaseSpec) -> tuple[Reason, ...]:
    """A warning if the names of two bases differ; used where their files cannot be compared.

    A folder, a quantised file and a repository of one base mostly share the last part of their
    names, up to a suffix.
    """
    theirs, ours = (name.rpartition("/")[2].lower() for name in (named, base.base_model))
    ours = ours.removeprefix(PATH)
    if theirs.startswith(ours) or ours.startswith(theirs):
        return ()
    return (
        Reason(
            "base_named_differently",
            f"it was trained on {shortened(named)}, and the base of this run is {base.base_model};"
            " only its shapes are known to fit",
        ),
    )


def look_up_on_hub(context: RunContext, base: BaseSpec, ours: Path) -> LookUp:
    """A function that compares a named base on the Hub with ours, and saves its verdict.

    Each base is looked up once. The next run tries an unreachable one again.

    Args:
        ours: the folder with config and tokenizer of our base
    """

    @functools.cache
    def look_up(named: str) -> BaseVerdict:
        verdict = saved_verdict(context, base, named)
        if verdict.unreachable:
            verdict = _compare(named, ours, hub_of(context.recipe, named))
            if not verdict.unreachable:
                write_note(_verdict_file(context, base, named), canonical_json(verdict.to_dict()))
        return verdict

    return look_up


def saved_verdict(context: RunContext, base: BaseSpec, named: str) -> BaseVerdict:
    """The saved verdict of an earlier run, without the Hub; `unreachable` if there is none."""
    saved = read_note(_verdict_file(context, base, named), BaseVerdict.from_dict)
    return saved or BaseVerdict("it was not looked up yet")


def _compare(named: str, ours: Path, hub: Hub) -> BaseVerdict:
    try:
        ref = repositories.resolve(named, hub=hub)
        with temporary_folder(Path(tempfile.gettempdir()), "meteora-compare-") as scratch:
            theirs = scratch / "profile"
            say(f"comparing {named}, which an adapter names, with the base")
            repositories.download_profile(ref, theirs, hub=hub)
            asked = (named, str(theirs), str(ours))
            answer = isolated.call(compare, *asked, seconds=COMPARE_SECONDS)
    except HubError as error:
        return BaseVerdict(str(error))
    except ChildError as error:
        return BaseVerdict(f"to compare them failed: {brief(error)}")
    return BaseVerdict.from_dict(answer)


def compare(named: str, theirs: str, ours: str) -> dict[str, Any]:
    """The verdict on a base, from the folders with its profile and with ours."""
    from meteora.base.match import UnreadableBaseError, compare_bases  # noqa: PLC0415  (torch)

    try:
        found = compare_bases(named, Path(theirs), Path(ours))
    except UnreadableBaseError as error:
        return BaseVerdict(str(error)).to_dict()
    return BaseVerdict("", tuple(found.refusals), tuple(found.warnings)).to_dict()


def _named_base(adapter: Adapter, folder: Path) -> str:
    """The `owner/name` of the adapter's base; empty if neither config nor card names one."""
    for name in (adapter.spec.base_model, base_of(folder)):
        if REPO_ID.fullmatch(name):
            return name
    return ""


def _verdict_file(context: RunContext, base: BaseSpec, named: str) -> Path:
    key = canonical_sha256([named.lower(), base.id])
    return context.adapters_folder / "named-bases" / f"{key[:32]}.json"
