"""Whether anything is left to do; found out without a model library or a scheduler."""

from dataclasses import dataclass

from meteora.artifacts import BaseSpec, BuiltBase, MeteoraError
from meteora.base.sources import texts_sha256
from meteora.checkpoint.manifest import EVAL_RESULTS, read_manifest
from pipelines.admission import sources
from pipelines.planning.plan import Plan
from pipelines.planning.resolve import local_steps, resolve
from pipelines.publishing.signing import is_signed
from pipelines.recipe.stage import Stage
from pipelines.reports.hub_metadata import write_eval_results
from pipelines.reports.summary import Summary, summarise
from pipelines.workspace.bases import require_sound
from pipelines.workspace.checkpoints import is_whole
from pipelines.workspace.context import RunContext


@dataclass(frozen=True)
class Look:
    """The results of a recipe on this disk, as far as they are known without a download.

    The next run starts from it: it does not hash the base or make the plan again.
    """

    base: BaseSpec | None
    """None if the Hub did not answer."""
    reason: str = ""
    """Why there is no base."""
    built: BuiltBase | None = None
    """None until the base is downloaded and hashed."""
    plan: Plan | None = None
    """None until every adapter is downloaded, or if a run will refuse one."""
    summary: Summary | None = None
    """Of all results; None if anything is left to do."""


def look(context: RunContext, until: Stage = Stage.publish) -> Look:
    """Resolve a recipe from the files on this disk, and look up its results in the ledger.

    A passing fault of the network is no error: the flow tries again, and waits in between. Stages
    after `until` count as done.

    Raises:
        MeteoraError: The recipe cannot be resolved, and another try would not help.
    """
    try:
        base = sources.resolve_base(context)
    except MeteoraError as error:
        _raise_unless_it_may_pass(error)
        return Look(None, str(error))
    built = context.ledger.built_as(BuiltBase, base.id)
    if built is None or not context.base_folder(base).is_dir():
        return Look(base)
    require_sound(context.ledger, base)
    try:
        plan = resolve(context, built, local_steps(context, base))
    except MeteoraError as error:
        if not isinstance(error, (sources.NotHereError, sources.NoExpertsError)):
            _raise_unless_it_may_pass(error)
        return Look(base, built=built)
    summary = _summary(context, plan) if plan.is_pool_divided else None
    if summary and until is Stage.publish and not _is_published(context, plan):
        summary = None
    return Look(base, built=built, plan=plan, summary=summary)


def look_or_reason(context: RunContext, until: Stage) -> Look:
    """`look`, but an error becomes the reason: the run meets it again, and records it."""
    try:
        return look(context, until)
    except MeteoraError as error:
        return Look(None, str(error))


def _raise_unless_it_may_pass(error: MeteoraError) -> None:
    if not getattr(error, "retry", False):
        raise error


def _summary(context: RunContext, plan: Plan) -> Summary | None:
    """The summary of a plan if all its results are recorded and its checkpoint is written."""
    if not (context.holds(plan.fused.id) and context.holds(plan.router.id)):
        return None
    summary = summarise(context.ledger, plan, context.base_folder(plan.base))
    return summary if summary and _is_written(context, plan, summary) else None


def _is_written(context: RunContext, plan: Plan, summary: Summary) -> bool:
    """Whether the checkpoint is whole, with the leaderboards that the recipe names now.

    It also has to be the recorded one: of two homes that share a store and make gates at the same
    time, the earlier record counts. A signed checkpoint stays as it is.
    """
    folder = context.checkpoint_folder(plan.router.id)
    if not is_whole(folder):
        return False
    if is_signed(folder):
        return True
    ledger = context.ledger
    recorded = {*ledger.blobs_of(plan.fused.id), *ledger.blobs_of(plan.router.id)}
    if not recorded.issuperset(read_manifest(folder).files.values()):
        return False
    results = folder / EVAL_RESULTS
    written = results.read_text(encoding="utf-8") if results.is_file() else ""
    asked = write_eval_results(context.recipe.benchmark.tasks, summary)
    return written == asked


def _is_published(context: RunContext, plan: Plan) -> bool:
    """Whether the checkpoint was last published as the recipe asks now; True if it does not ask."""
    to = context.recipe.publish
    if to is None:
        return True
    found = context.ledger.publications(to.repo)
    made = next((one for one in reversed(found) if one.artifact_id == plan.router.id), None)
    if made is None or made.private != to.private or to.tag not in {"", made.tag}:
        return False
    return made.texts_sha256 == texts_sha256(context.checkpoint_folder(plan.router.id))
