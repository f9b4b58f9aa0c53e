"""Whether anything is left to do. No model library and no scheduler is loaded to know it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meteora.artifacts import BuiltBase, MeteoraError
from pipelines import plan, sources
from pipelines.experts import Refusal, gather
from pipelines.summary import summarise

if TYPE_CHECKING:
    from pipelines.plan import Plan
    from pipelines.workplace import Workplace


def finished(work: Workplace) -> Plan | None:
    """The plan of a recipe whose every result is in the ledger; None if anything is left to do.

    Names are resolved, and nothing is downloaded: what is not here yet is left to do. So it is
    where the network has a passing fault: the flow asks again, and waits in between.
    """
    try:
        return _finished(work)
    except MeteoraError as error:
        if getattr(error, "retry", False):
            return None
        raise


def _finished(work: Workplace) -> Plan | None:
    base = sources.resolve_base(work.recipe, work.folder)
    known = work.ledger.built(base.id)
    if known is None or not work.base_folder(base).is_dir():
        return None
    recipe = sources.discover(work.recipe)
    experts = []
    try:
        for _, outcome in gather(
            recipe,
            work.folder,
            BuiltBase.from_dict(known),
            work.adapters_folder,
            resolve=sources.resolve_adapter,
            fetch=sources.adapter_at_hand,
        ):
            if not isinstance(outcome, Refusal):
                experts.append(outcome)
            elif not outcome.left_out:
                return None
    except sources.NotHereError:
        return None
    if not experts:
        return None
    planned = plan.make_plan(recipe, work.folder, base, experts)
    whole = (
        work.holds(planned.fused.id)
        and work.holds(planned.router.id)
        and summarise(work.ledger, planned, work.base_folder(base)) is not None
        and work.checkpoint_folder(planned.router.id).is_dir()
    )
    return planned if whole else None
