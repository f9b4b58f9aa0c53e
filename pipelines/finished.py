"""Whether anything is left to do. No model library and no scheduler is loaded to know it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meteora.adapters import AdapterError
from meteora.artifacts import BuiltBase
from pipelines import plan
from pipelines.summary import summarise

if TYPE_CHECKING:
    from pipelines.plan import Plan
    from pipelines.workplace import Workplace


def finished(work: Workplace) -> Plan | None:
    """The plan of a recipe whose every result is in the ledger; None if anything is left to do."""
    base = plan.resolve_base(work.recipe, work.folder)
    known = work.ledger.built(base.id)
    if known is None or not work.base_folder(base).is_dir():
        return None
    built = BuiltBase.from_dict(known)
    experts = []
    for section in work.recipe.experts:
        ref = plan.resolve_adapter(section, work.folder)
        folder = plan.fetch_adapter(section, ref, work.folder, work.home / "adapters")
        try:
            experts.append(plan.read_expert(section, ref, folder, work.recipe, built))
        except AdapterError:
            if work.recipe.policy.on_refused == "fail":
                return None
    planned = plan.make_plan(work.recipe, work.folder, base, experts)
    whole = (
        work.holds(planned.fused.id)
        and work.holds(planned.router.id)
        and summarise(work.ledger, planned, work.base_folder(base)) is not None
        and work.checkpoint_folder(planned.router.id).is_dir()
    )
    return planned if whole else None
