"""Experts that change nothing on a probe prompt: each is named and recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from meteora.artifacts import Reason
from meteora.model.silent_experts import silent_experts
from pipelines.admission.verdicts import record_accepted, with_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.admission.experts import Expert
    from pipelines.workspace.context import RunContext


def probe(
    context: RunContext,
    experts: Sequence[Expert],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Warn of each expert that changes no logit of a probe prompt, and record the warning.

    It is not refused: its weights are sound, and one prompt shows only that it is weak there. The
    benchmark measures its quality.
    """
    if not experts:
        return
    silent = silent_experts(model, tokenizer, [expert.name for expert in experts])
    for expert in experts:
        if (change := silent.get(expert.name)) is None:
            continue
        warned = with_warnings(expert, [no_effect(change)])
        record_accepted(context, warned)


def no_effect(change: float) -> Reason:
    """The reason for an expert that changes nothing on the probe prompt."""
    return Reason(
        "no_effect",
        f"forced on a probe prompt it changes no logit by more than {change:.1e} of the largest,"
        " which is rounding: it answers as the base does; train it longer, or leave it out",
    )
