"""Every expert of a stack is heard: one that says nothing is named, and it is recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meteora.artifacts import Reason
from meteora.model.silent_experts import silent_experts
from pipelines.admission.verdicts import record
from pipelines.workspace.console import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.admission.experts import Expert
    from pipelines.workspace.context import RunContext


def probe(
    work: RunContext,
    experts: Sequence[Expert],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Name each expert that changes no logit of a probe prompt, and record it with its verdict.

    It is a warning. The numbers of such an expert are sound and nothing is wrong with the others:
    one prompt shows that it is weak, and no more; the benchmark shows what it is worth.
    """
    silent = silent_experts(model, tokenizer)
    for expert in experts:
        if (change := silent.get(expert.name)) is None:
            continue
        reason = no_effect(change)
        say(f"{expert.name}: {reason.message}", "note")
        record(work.ledger, work.run_id, expert, (*expert.adapter.reasons, reason))


def no_effect(change: float) -> Reason:
    """What to say of an expert that was heard on the probe prompt and changed nothing."""
    return Reason(
        "no_effect",
        f"forced on a probe prompt it changes no logit by more than {change:.1e} of the largest,"
        " which is rounding: it answers as the base does; train it longer, or leave it out",
    )
