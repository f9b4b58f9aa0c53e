"""Whether anything is left to do. No model library and no scheduler is loaded to know it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from meteora.artifacts import BuiltBase, MeteoraError
from meteora.base.sources import texts_sha256
from pipelines.admission import sources
from pipelines.admission.base_identity import saved_verdict
from pipelines.admission.experts import Refusal, Requirements, read_experts
from pipelines.planning import plan
from pipelines.recipe.stage import Stage
from pipelines.reports.hub_metadata import EVAL_RESULTS, write_eval_results
from pipelines.reports.summary import summarise

if TYPE_CHECKING:
    from pipelines.planning.plan import Plan
    from pipelines.reports.summary import Summary
    from pipelines.workspace.context import RunContext


def finished(work: RunContext, until: Stage = Stage.publish) -> Plan | None:
    """The plan of a recipe whose every result is in the ledger; None if anything is left to do.

    What comes after the stage `until` is not asked for.

    Names are resolved, and nothing is downloaded: what is not here yet is left to do. So it is
    where the network has a passing fault: the flow asks again, and waits in between.
    """
    try:
        planned = _finished(work)
    except MeteoraError as error:
        if getattr(error, "retry", False):
            return None
        raise
    if planned is None or (until is Stage.publish and not published(work, planned)):
        return None
    return planned


def published(work: RunContext, planned: Plan) -> bool:
    """Whether the checkpoint, as it is now, lies where the recipe publishes, if it does."""
    to = work.recipe.publish
    if to is None:
        return True
    texts = texts_sha256(work.checkpoint_folder(planned.router.id))
    return any(
        one.artifact_id == planned.router.id
        and one.texts_sha256 == texts
        and one.private == to.private
        for one in work.ledger.publications(to.repo)
    )


def _finished(work: RunContext) -> Plan | None:
    base = sources.resolve_base(work.recipe, work.folder)
    known = work.ledger.built(base.id)
    if known is None or not work.base_folder(base).is_dir():
        return None
    built = BuiltBase.from_dict(known)
    recipe = sources.discover(work.recipe)
    look_up = partial(saved_verdict, work.adapters_folder, base)
    gates = recipe.router.kind == "gate"
    experts = []
    try:
        for _, outcome in read_experts(
            recipe,
            work.folder,
            Requirements(base, built.sizes, recipe.policy, look_up, in_layers=gates),
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
        and (summary := summarise(work.ledger, planned, work.base_folder(base))) is not None
        and _is_written(work, planned, summary)
    )
    return planned if whole else None


def _is_written(work: RunContext, planned: Plan, summary: Summary) -> bool:
    """Whether the checkpoint is there, with the leaderboards that the recipe names now."""
    folder = work.checkpoint_folder(planned.router.id)
    results = folder / EVAL_RESULTS
    there = results.read_text() if results.is_file() else ""
    asked = write_eval_results(work.recipe.benchmark.tasks, summary)
    return folder.is_dir() and there == asked
