"""Every adapter is read, and later heard; the verdict on it is recorded and said."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from meteora import adapters
from meteora.artifacts import COMMIT, MeteoraError
from meteora.probe import silent_experts
from meteora.proportion import check_proportion
from pipelines import hub
from pipelines.base_lookup import looking_up
from pipelines.experts import Ground, Refusal, gather, reasons_of
from pipelines.machine import memory_bytes
from pipelines.progress import say
from pipelines.recipe import FoundExpert
from pipelines.sources import hub_of
from store.events import AdapterVerdict, Failure, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.artifacts import AdapterRef, BuiltBase
    from pipelines.experts import Expert, Fetch, Resolve
    from pipelines.hub import Hub, HubSource
    from pipelines.plan import Plan
    from pipelines.workplace import Workplace
    from store.ledger import Ledger


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
    cache, base, hub_at = work.adapters_folder, built.spec, partial(hub_of, work.recipe)
    look_up = looking_up(cache, base, work.base_folder(base), hub_at)
    gates = work.recipe.router.kind == "gate"
    ground = Ground(base, built.sizes, work.recipe.policy, look_up, in_layers=gates)
    gathered = gather(work.recipe, work.folder, ground, cache, resolve=resolve, fetch=fetch)
    for section, outcome in gathered:
        if isinstance(outcome, Refusal):
            num_refused += 1
            about = about_of(outcome.ref, cache, hub_at)
            refuse(work.ledger, work.run_id, section.name, section.adapter, outcome, about)
            if not outcome.left_out:
                raise outcome.error
            say(f"{section.name}: {outcome.error}", "left out")
            continue
        expert = in_proportion(described(outcome, cache, hub_at), built.norms)
        record(work.ledger, work.run_id, expert, expert.adapter.reasons)
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
        say(reason.message, "note")
    for expert in experts:
        spec = expert.adapter.spec
        work.ledger.record_artifact(spec, weights_sha256=spec.weights_sha256, run_id=work.run_id)


def record(ledger: Ledger, run_id: str, expert: Expert, reasons: Sequence[adapters.Reason]) -> None:
    """Record that an expert is taken, and what to beware of."""
    ledger.record_adapter(
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
        run_id=run_id,
    )


def refuse(
    ledger: Ledger,
    run_id: str,
    name: str,
    source: str,
    refusal: Refusal,
    about: HubSource | None,
) -> None:
    """Record that an adapter is refused, and why.

    Args:
        about: What the Hub says of its repository.
    """
    ref, error = refusal.ref, refusal.error
    ledger.record_adapter(
        AdapterVerdict(
            name=name,
            source=source,
            repo_id=ref.repo_id,
            revision=ref.revision,
            subfolder=ref.subfolder,
            verdict="refuse",
            reasons=_nouns(reasons_of(error)),
            licence=about.licence if about else "",
            **_facts(about),
        ),
        run_id=run_id,
    )
    failure = Failure("check", name, type(error).__name__, str(error))
    ledger.record_failure(failure, run_id=run_id)


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
        reason = no_effect(change)
        say(f"{expert.name}: {reason.message}", "note")
        record(work.ledger, work.run_id, expert, (*expert.adapter.reasons, reason))


def no_effect(change: float) -> adapters.Reason:
    """What to say of an expert that was heard on the probe prompt and changed nothing."""
    return adapters.Reason(
        "no_effect",
        f"forced on a probe prompt it changes no logit by more than {change:.1e} of the largest,"
        " which is rounding: it answers as the base does; train it longer, or leave it out",
    )


def in_proportion(expert: Expert, base_norms: Mapping[str, float]) -> Expert:
    """With a warning where what it adds is out of all proportion to the base's own weights."""
    reasons = check_proportion(expert.adapter, base_norms)
    for reason in reasons:
        say(f"{expert.name}: {reason.message}", "note")
    adapter = replace(expert.adapter, reasons=(*expert.adapter.reasons, *reasons))
    return replace(expert, adapter=adapter)


def described(expert: Expert, cache: Path, hub_at: Callable[[str], Hub]) -> Expert:
    """With what the Hub says of its repository, where it is from there."""
    about = about_of(expert.ref, cache, hub_at)
    if about is None:
        return expert
    return replace(expert, licence=expert.licence or about.licence, about=about)


def about_of(ref: AdapterRef, cache: Path, hub_at: Callable[[str], Hub]) -> HubSource | None:
    """What the Hub says of a repository; None where it was not asked, or says nothing."""
    if COMMIT.fullmatch(ref.revision) is None:
        return None
    return hub.describe(ref, cache, hub=hub_at(ref.repo_id))


def _nouns(reasons: Sequence[adapters.Reason]) -> tuple[Reason, ...]:
    return tuple(Reason(reason.code, reason.message) for reason in reasons)


def _facts(about: HubSource | None) -> dict[str, Any]:
    if about is None:
        return {}
    return {
        "author": about.author,
        "base_models": about.base_models,
        "downloads": about.downloads,
    }
