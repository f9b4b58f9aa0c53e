"""The base that an adapter names, against the one at hand: what was found, and what follows.

Names decide nothing where they differ: a mirror, a quantised copy or a renamed repository is the
same base, and a base of the same shapes may be another. What one was found to be is kept, so that a
finished run is known to be finished without asking anybody again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meteora.adapters.compatibility import IncompatibleAdaptersError
from meteora.artifacts import COMMIT, REPO_ID, Noun, Reason, canonical_json, canonical_sha256
from pipelines.hub.card import base_of
from pipelines.hub.snapshot import write_note

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from meteora.adapters.tensors import Adapter
    from meteora.artifacts import AdapterRef, BaseSpec
    from pipelines.recipe.recipe import PolicySection

    LookUp = Callable[[str], "BaseVerdict"]


@dataclass(frozen=True)
class BaseVerdict(Noun):
    """What a named base is found to be, beside the one at hand."""

    unreachable: str = ""
    """Why it cannot be looked at; empty where it was."""
    refusals: tuple[Reason, ...] = ()
    warnings: tuple[Reason, ...] = ()


def judge_base(
    adapter: Adapter,
    folder: Path,
    ref: AdapterRef,
    base: BaseSpec,
    policy: PolicySection,
    look_up: LookUp,
) -> tuple[Reason, ...]:
    """Warnings about the base that an adapter names.

    It is looked up where the Hub is in use anyway, for the adapter or the base; a policy that
    refuses unreachable bases asks for it everywhere.

    Args:
        folder: Of the adapter; its card may name a base where its config does not.
        base: That the adapter is to lie on.

    Raises:
        IncompatibleAdaptersError: It is another base, or the policy wants it looked at and it
            cannot be.
    """
    named = _named(adapter, folder)
    if named and named.lower() == base.base_model.lower():
        return ()
    strict = policy.unreachable_base == "refuse"
    on_the_hub = COMMIT.fullmatch(ref.revision) or COMMIT.fullmatch(base.base_revision)
    if named and (strict or on_the_hub):
        verdict = look_up(named)
        name = named
    else:
        verdict = BaseVerdict("it names none that the Hub could have")
        name = adapter.spec.base_model or "its base"
    if verdict.refusals:
        raise IncompatibleAdaptersError(str(folder), verdict.refusals)
    if not verdict.unreachable:
        return verdict.warnings
    if strict:
        reason = Reason(
            "base_unreachable",
            f"{name} cannot be compared with the base at hand ({verdict.unreachable}), and"
            " `unreachable_base: refuse` wants that; allow it with warn, or leave it out",
        )
        raise IncompatibleAdaptersError(str(folder), (reason,))
    if not named or not on_the_hub:
        return ()  # a warning says already that none is named, or only shapes could be compared
    return (
        Reason(
            "base_unreachable",
            f"it was trained on {name}, which cannot be compared with the base at hand"
            f" ({verdict.unreachable}); its shapes fit, and that is all that is known",
        ),
    )


def _named(adapter: Adapter, folder: Path) -> str:
    """The `owner/name` of its base; empty where neither config nor card has one."""
    for name in (adapter.spec.base_model, base_of(folder)):
        if REPO_ID.fullmatch(name) and ".." not in name:
            return name
    return ""


def kept(cache: Path, base: BaseSpec, named: str) -> BaseVerdict:
    """What was found out about a named base before, without asking anybody."""
    file = _file(cache, base, named)
    if not file.is_file():
        return BaseVerdict("it was not looked up yet")
    return BaseVerdict.from_dict(json.loads(file.read_text(encoding="utf-8")))


def keep(cache: Path, base: BaseSpec, named: str, verdict: BaseVerdict) -> None:
    write_note(_file(cache, base, named), canonical_json(verdict.to_dict()))


def _file(cache: Path, base: BaseSpec, named: str) -> Path:
    asked = canonical_sha256([named.lower(), base.id])
    return cache / "named-bases" / f"{asked[:32]}.json"
