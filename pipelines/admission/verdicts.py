"""Verdicts on adapters: printed, and recorded in the ledger."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from meteora.adapters.compatibility import check_stackable
from meteora.adapters.tensors import Adapter
from meteora.artifacts import COMMIT, AdapterRef, Reason
from meteora.untrusted.findings import AdapterError
from pipelines.admission.experts import Expert, Refusal
from pipelines.hub.about import HubSource, facts_of
from pipelines.hub.client import hub_of
from pipelines.workspace.console import say
from pipelines.workspace.context import RunContext
from store.events import AdapterVerdict, Failure, Judgement

Proportion = Callable[[Adapter, Mapping[str, float]], Sequence[Reason]]
"""Warnings about an adapter whose update is far too large beside the base's weights."""


def accept(
    context: RunContext, base_norms: Mapping[str, float], proportion: Proportion, expert: Expert
) -> Expert:
    """Record that an adapter is accepted; returns the expert with all its warnings.

    Args:
        base_norms: of the base's linear layers, by path
    """
    reasons = proportion(expert.adapter, base_norms)
    expert = with_warnings(with_hub_facts(context, expert), reasons)
    record_accepted(context, expert)
    return expert


def refuse(context: RunContext, refusal: Refusal) -> None:
    """Record that an adapter is refused, and why, with the Hub's facts on its repository.

    Raises:
        AdapterError, UnusableRepositoryError: The reason, unless the adapter is left out.
    """
    error, ref = refusal.error, refusal.ref
    about = _hub_facts(context, ref) if ref else None
    reasons = error.reasons if isinstance(error, AdapterError) else [Reason("hub", str(error))]
    verdict = _verdict(refusal, about, "refuse", reasons)
    context.ledger.record_adapter(verdict, run_id=context.run_id)
    failure = Failure("check", refusal.name, type(error).__name__, str(error))
    context.ledger.record_failure(failure, run_id=context.run_id)
    if not refusal.left_out:
        raise error
    say(f"{refusal.name}: {error}", "left out")


def require_stackable(
    context: RunContext, memory_limit_bytes: int, experts: Sequence[Expert]
) -> None:
    """Record the experts as artifacts, if they fit into one stack.

    Raises:
        IncompatibleAdaptersError: They cannot, or the stack needs more memory than there is.
    """
    adapters = {expert.name: expert.adapter for expert in experts}
    for reason in check_stackable(adapters, memory_limit_bytes):
        say(reason.message, "note")
    specs = [expert.adapter.spec for expert in experts]
    context.ledger.record_adapters(specs, run_id=context.run_id)


def record_accepted(context: RunContext, expert: Expert) -> None:
    """Record that an adapter is accepted, with its warnings."""
    reasons = expert.adapter.reasons
    word = "warn" if reasons else "accept"
    verdict = _verdict(expert, expert.about, word, reasons)
    verdict = replace(verdict, licence=expert.licence, adapter_id=expert.adapter.spec.id)
    context.ledger.record_adapter(verdict, run_id=context.run_id)


def with_warnings(expert: Expert, reasons: Sequence[Reason]) -> Expert:
    """Print further warnings; returns the expert with them."""
    for reason in reasons:
        say(f"{expert.name}: {reason.message}", "note")
    adapter = replace(expert.adapter, reasons=(*expert.adapter.reasons, *reasons))
    return replace(expert, adapter=adapter)


def with_hub_facts(context: RunContext, expert: Expert) -> Expert:
    """The expert with the Hub's facts on its repository, if it is from the Hub."""
    about = _hub_facts(context, expert.ref)
    if about is None:
        return expert
    return replace(expert, licence=expert.licence or about.licence, about=about)


def _hub_facts(context: RunContext, ref: AdapterRef) -> HubSource | None:
    """The Hub's facts on an adapter's repository; None if it is not from there."""
    if COMMIT.fullmatch(ref.revision) is None:
        return None
    return facts_of(ref, context.adapters_folder, hub=hub_of(context.recipe, ref.repo_id))


def _verdict(
    one: Expert | Refusal, about: HubSource | None, word: Judgement, reasons: Sequence[Reason]
) -> AdapterVerdict:
    """The verdict on an adapter, with the Hub's facts on its repository."""
    ref = one.ref
    repo_id, revision = (ref.repo_id, ref.revision) if ref else (one.source.partition("@")[0], "")
    subfolder = ref.subfolder if ref else ""
    verdict = AdapterVerdict(
        one.name, one.source, repo_id, revision, word, tuple(reasons), subfolder=subfolder
    )
    if about is None:
        return verdict
    return replace(
        verdict,
        licence=about.licence,
        author=about.author,
        base_models=about.base_models,
        downloads=about.downloads,
    )
