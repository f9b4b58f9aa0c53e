"""Every adapter is read, and later heard; the verdict on it is recorded and said."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from meteora import adapters
from meteora.artifacts import COMMIT, MeteoraError
from meteora.probe import silent_experts
from meteora.proportion import check_proportion
from pipelines import hub
from pipelines.base_lookup import looking_up
from pipelines.experts import Refusal, gather
from pipelines.machine import memory_bytes
from pipelines.progress import say
from pipelines.recipe import FoundExpert
from pipelines.sources import hub_of
from store.events import AdapterVerdict, Failure, Reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.artifacts import AdapterRef, BuiltBase
    from pipelines.experts import Expert, Fetch, Resolve
    from pipelines.hub import HubSource
    from pipelines.plan import Plan
    from pipelines.recipe import ExpertSection
    from pipelines.workplace import Workplace


def find_experts(
    work: Workplace, built: BuiltBase, *, resolve: Resolve, fetch: Fetch
) -> list[Expert]:
    """Every adapter of the recipe that is sound; a refused one ends the run or is left out.

    Args:
        resolve, fetch: As `experts.gather` takes them.
    """
    experts, num_refused = [], 0
    if found := sum(isinstance(section, FoundExpert) for section in work.recipe.experts):
        say(f"found {found} adapters on the Hub")
    gathered = gather(
        work.recipe,
        work.folder,
        built,
        work.adapters_folder,
        resolve=resolve,
        fetch=fetch,
        look_up=looking_up(work, built),
    )
    for section, outcome in gathered:
        if isinstance(outcome, Refusal):
            num_refused += 1
            _refuse(work, section, outcome)
            continue
        expert = _described(work, _in_proportion(outcome, built))
        record(work, expert, expert.adapter.reasons)
        experts.append(expert)
    if not experts:
        raise MeteoraError(
            f"of {num_refused} adapters none can be used, so there is nothing to stack"
            if num_refused
            else "no adapter was found, so there is nothing to stack; ask for other tags, or none"
        )
    return experts


def check(work: Workplace, built: BuiltBase, experts: Sequence[Expert]) -> None:
    """Refuse experts that cannot lie in one stack on this base; record those that can."""
    found = {expert.name: expert.adapter for expert in experts}
    memory = memory_bytes()
    for reason in adapters.check_stackable(found, base=built.sizes, memory_limit_bytes=memory):
        say(f"[yellow]note:[/] {reason.message}")
    for expert in experts:
        spec = expert.adapter.spec
        work.ledger.record_artifact(spec, weights_sha256=spec.weights_sha256, run_id=work.run_id)


def record(work: Workplace, expert: Expert, reasons: Sequence[adapters.Reason]) -> None:
    """Record that an expert is taken, and what to beware of."""
    _record(
        work,
        AdapterVerdict(
            name=expert.name,
            source=expert.source,
            repo_id=expert.ref.repo_id,
            revision=expert.ref.revision,
            subfolder=expert.ref.subfolder,
            verdict="warn" if reasons else "accept",
            reasons=_nouns(reasons),
            licence=expert.licence,
            adapter_id=expert.adapter.spec.id,
            **_facts(expert.about),
        ),
    )


def probe(
    work: Workplace, plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Name each expert that changes no logit of a probe prompt, and record it with its verdict.

    It is a warning. The numbers of such an expert are sound and nothing is wrong with the others:
    one prompt shows that it is weak, and no more; the benchmark shows what it is worth.
    """
    silent = silent_experts(model, tokenizer)
    for expert in plan.experts:
        if (change := silent.get(expert.name)) is None:
            continue
        reason = adapters.Reason(
            "no_effect",
            f"forced on a probe prompt it changes no logit by more than {change:.1e} of the"
            " largest, which is rounding: it answers as the base does; train it longer, or leave it"
            " out",
        )
        say(f"[yellow]note:[/] {expert.name}: {reason.message}")
        record(work, expert, (*expert.adapter.reasons, reason))


def _refuse(work: Workplace, section: ExpertSection, refusal: Refusal) -> None:
    ref: AdapterRef = refusal.ref
    about = _about(work, ref)
    _record(
        work,
        AdapterVerdict(
            name=section.name,
            source=section.adapter,
            repo_id=ref.repo_id,
            revision=ref.revision,
            subfolder=ref.subfolder,
            verdict="refuse",
            reasons=_nouns(refusal.reasons),
            licence=about.licence if about else "",
            **_facts(about),
        ),
    )
    error = refusal.error
    failure = Failure("check", section.name, type(error).__name__, str(error))
    work.ledger.record_failure(failure, run_id=work.run_id)
    if not refusal.left_out:
        raise error
    say(f"[yellow]left out:[/] {section.name}: {error}")


def _record(work: Workplace, verdict: AdapterVerdict) -> None:
    work.ledger.record_adapter(verdict, run_id=work.run_id)


def _nouns(reasons: Sequence[adapters.Reason]) -> tuple[Reason, ...]:
    return tuple(Reason(reason.code, reason.message) for reason in reasons)


def _in_proportion(expert: Expert, built: BuiltBase) -> Expert:
    """With a warning where what it adds is out of all proportion to the base's own weights."""
    reasons = check_proportion(expert.adapter, built.norms)
    for reason in reasons:
        say(f"[yellow]note:[/] {expert.name}: {reason.message}")
    adapter = replace(expert.adapter, reasons=(*expert.adapter.reasons, *reasons))
    return replace(expert, adapter=adapter)


def _described(work: Workplace, expert: Expert) -> Expert:
    """With what the Hub says of its repository, where it is from there."""
    about = _about(work, expert.ref)
    if about is None:
        return expert
    return replace(expert, licence=expert.licence or about.licence, about=about)


def _about(work: Workplace, ref: AdapterRef) -> HubSource | None:
    if COMMIT.fullmatch(ref.revision) is None:
        return None
    return hub.describe(ref, work.adapters_folder, hub=hub_of(work.recipe, ref.repo_id))


def _facts(about: HubSource | None) -> dict[str, Any]:
    if about is None:
        return {}
    return {
        "author": about.author,
        "base_models": about.base_models,
        "downloads": about.downloads,
    }
