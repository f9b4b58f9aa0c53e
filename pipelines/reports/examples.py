"""Test prompts that a report shows answered, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from meteora.base.chat_template import encode_prompt
from meteora.model.trace import trace
from pipelines.reports.trace import trace_figure
from pipelines.workspace.console import bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.reports.queries import Asked
    from store.ledger import Ledger

MAX_NEW_TOKENS = 128
"""A trace that is longer is not looked at."""


@dataclass(frozen=True)
class Example:
    task: str
    prompt: str
    reference: str
    templated: bool
    """Whether it was asked in the tokenizer's chat template, where there is one."""
    max_new_tokens: int


def examples(ledger: Ledger, outputs: Asked, count: int) -> list[Example]:
    """The first row of each of the first `count` tasks; composites come first."""
    found = []
    for row in outputs.rows[:count]:
        path = ledger.blobs.path_of(row["outputs_sha256"])
        asked = pq.read_table(path).slice(0, 1).to_pylist()[0]
        found.append(
            Example(
                task=row["task"],
                prompt=str(asked["prompt"]),
                reference=str(asked.get("reference", "")),
                templated=row["templated"] is not False,
                max_new_tokens=min(MAX_NEW_TOKENS, row["max_new_tokens"]),
            )
        )
    return found


def traced(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chosen: Sequence[Example]
) -> list[dict[str, Any]]:
    """A figure of each example, answered anew."""
    drawn = []
    with bar("tracing examples", len(chosen), "prompts") as advance:
        for number, example in enumerate(chosen):
            ids = (
                encode_prompt(tokenizer, example.prompt)
                if example.templated
                else list(tokenizer(example.prompt).input_ids)
            )
            found = trace(model, tokenizer, ids, max_new_tokens=example.max_new_tokens)
            expected = " ".join(example.reference.split())[:80]
            drawn.append(trace_figure(found, f"trace-{number}", f"{example.task}: {expected}"))
            advance(1)
    return drawn
