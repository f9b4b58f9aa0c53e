"""From a recipe to its plan: adapters are found, fetched and judged, and all specs are made.

A run, the look (the check whether anything is left to do), and `--dry-run` share this code. They
differ in their `Steps`: a run downloads and records, the others use the files on this disk.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from meteora.adapters.compatibility import IncompatibleAdaptersError
from meteora.artifacts import WITH_GATES, AdapterRef, BaseSpec, BuiltBase, Reason
from meteora.untrusted.findings import AdapterError, counted
from pipelines.admission import sources, verdicts
from pipelines.admission.base_identity import LookUp, look_up_on_hub, saved_verdict
from pipelines.admission.experts import Expert, Missing, Outcome, Refusal, Requirements, read_expert
from pipelines.admission.verdicts import Proportion
from pipelines.data.rows import ExamplesError
from pipelines.hub.errors import UnusableRepositoryError
from pipelines.planning.plan import Plan, make_plan, stack_of
from pipelines.recipe.recipe import ExpertSection, FoundExpert, Recipe
from pipelines.workspace.context import RunContext


def _leave_to_the_run(refusal: Refusal) -> None:
    if not refusal.left_out:
        raise sources.NotHereError(f"{refusal.name} is refused, which a run records")


@dataclass(frozen=True)
class Steps:
    """The functions for each step from a recipe to its plan.

    The defaults are those of a look: nothing is downloaded, printed or recorded, and
    `sources.NotHereError` is raised where a run would download or refuse an adapter.
    """

    look_up: LookUp
    discover: Callable[[Recipe], Recipe] = sources.discover
    resolve_adapter: Callable[[RunContext, ExpertSection], AdapterRef] = sources.resolve_adapter
    fetch_adapter: Callable[[RunContext, ExpertSection, AdapterRef], Path] = sources.adapter_at_hand
    accept: Callable[[Expert], Expert] = lambda expert: expert
    """Called with each accepted expert; may add warnings."""
    refuse: Callable[[Refusal], None] = _leave_to_the_run
    """Called with each refusal; raises if the run cannot go on without that expert."""
    check_stack: Callable[[Sequence[Expert]], None] = lambda _experts: None
    """Called with all accepted experts; raises if they do not fit into one stack."""


def local_steps(context: RunContext, base: BaseSpec) -> Steps:
    """The steps of a look: they use only files on this disk."""
    return Steps(partial(saved_verdict, context, base))


def recording(
    context: RunContext, built: BuiltBase, proportion: Proportion, memory_limit_bytes: int
) -> Steps:
    """The steps of a run: adapters are downloaded, verdicts printed and recorded.

    Args:
        proportion: `update_norm.check_proportion`, or a call of it in the worker process.
        memory_limit_bytes: for a stack
    """
    return Steps(
        look_up_on_hub(context, built.spec, context.base_folder(built.spec)),
        fetch_adapter=sources.fetch_adapter,
        accept=partial(verdicts.accept, context, built.norms, proportion),
        refuse=partial(verdicts.refuse, context),
        check_stack=partial(verdicts.require_stackable, context, memory_limit_bytes),
    )


def resolve(context: RunContext, built: BuiltBase, steps: Steps, made: Plan | None = None) -> Plan:
    """The plan of a recipe.

    Args:
        made: The plan of a look at this recipe, which is used again if the experts are the same.

    Raises:
        AdapterError: An adapter is refused, and the recipe does not leave refused ones out.
        NoExpertsError: Not one adapter can be used.
        NotHereError: With `local_steps`: an adapter is not on this disk, or is refused.
        HubError: A fault of the Hub itself.
        ExamplesError: Rows are missing or malformed, or a test row is also an example.
    """
    context = replace(context, recipe=steps.discover(context.recipe))
    experts, num_refused = [], 0
    for outcome in read_adapters(context, built.spec, built.sizes, steps):
        if isinstance(outcome, Missing):
            raise sources.NotHereError(outcome.reason)
        if isinstance(outcome, Refusal):
            num_refused += 1
            steps.refuse(outcome)
        else:
            experts.append(steps.accept(outcome))
    if not experts:
        raise sources.NoExpertsError(
            f"of {counted(num_refused, 'adapter')} none can be used, so there is nothing to stack"
        )
    steps.check_stack(experts)
    if made is not None and made.fused == stack_of(built.spec, experts):
        return replace(made, experts=tuple(experts))
    return make_plan(context, built.spec, experts)


def complete(context: RunContext, plan: Plan) -> Plan:
    """The final plan of a recipe whose pool is now divided among the experts.

    Raises:
        ExamplesError: The pool, or the experts' examples, were changed meanwhile.
    """
    whole = make_plan(context, plan.base, plan.experts)
    if not whole.is_pool_divided:
        raise ExamplesError(
            f"gates.pool, {context.recipe.gates.pool}: it was changed while its prompts were"
            " divided; run again, with a copy of it if it is still written to"
        )
    return whole


def read_adapters(
    context: RunContext,
    base: BaseSpec | None,
    sizes: Mapping[str, tuple[int, int]],
    steps: Steps,
) -> Iterator[Outcome]:
    """Every adapter of the recipe, in order: accepted, refused, or not on this disk.

    Args:
        context: Its recipe includes the adapters that `discover` found.
        base, sizes: As in `Requirements`.

    Raises:
        HubError: A fault of the Hub itself; this is no verdict on the adapter.
    """
    recipe = context.recipe
    in_layers = recipe.router.kind in WITH_GATES
    requirements = Requirements(base, sizes, recipe.policy, steps.look_up, in_layers)
    known: dict[str, str] = {}
    for section in recipe.experts:
        name, source, ref = section.name, section.adapter, None
        try:
            ref = steps.resolve_adapter(context, section)
            folder = steps.fetch_adapter(context, section, ref)
            expert = read_expert(name, source, ref, folder, requirements)
            twin = known.setdefault(expert.adapter.spec.id, name)
            if twin != name and isinstance(section, FoundExpert):
                reason = Reason("same_adapter", f"it is the same adapter as {twin}")
                raise IncompatibleAdaptersError(name, (reason,))
        except sources.NotHereError as error:
            yield Missing(name, source, ref, str(error))
        except (AdapterError, UnusableRepositoryError) as error:
            left_out = recipe.policy.on_refused == "skip" or isinstance(section, FoundExpert)
            yield Refusal(name, source, ref, error, left_out)
        else:
            yield expert
