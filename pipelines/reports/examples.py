"""Test prompts, and a conversation, that a report shows with their answers and traces."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meteora.base.chat_template import encode_messages, encode_text
from meteora.model.chat import Chat
from meteora.model.trace import Trace, trace
from pipelines.data.dialogues import Dialogue
from pipelines.reports.trace import trace_figure
from pipelines.scoring.metrics import METRICS, RIGHT, TURNS_RIGHT
from pipelines.scoring.outputs import read_outputs
from pipelines.workspace.console import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.reports.queries import QueryResult
    from store.ledger import Ledger

MAX_NEW_TOKENS = 128
"""Longer traces are hard to read."""
JUDGING = {*METRICS, RIGHT, TURNS_RIGHT}
"""Metrics that rate an answer. A row of outputs has those of its task, in the task's order."""


@dataclass(frozen=True)
class Example:
    """A test prompt, its right answer, and the settings of its measurement."""

    task: str
    prompt: str
    reference: str
    """The right answer."""
    templated: bool
    """Whether it was put into the tokenizer's chat template, if there is one."""
    max_new_tokens: int
    dialogue: Dialogue | None = None
    """For a conversation, its questions; the prompt is then the last of them."""
    value: float | None = None
    """The recorded answer's value by the task's first metric; None if none is recorded."""
    system_prompt: str | None = None
    """Before the prompt; None is the chat template's default."""
    is_whole: bool = False
    """Whether the prompt is all that was read, the template included, as of lm-eval's own tasks."""

    @property
    def caption(self) -> str:
        """The task, the right answer, and the score of the model's answer."""
        reference = " ".join(self.reference.split())[:80]
        expected = f"expected: {reference}" if reference else ""
        judged = (
            ""
            if self.value is None
            else {1.0: "✓ right", 0.0: "✗ wrong"}.get(self.value, f"{self.value:.0%} right")
        )
        return "; ".join(filter(None, (self.task, expected, judged)))


def find_examples(ledger: Ledger, outputs: QueryResult, count: int) -> list[Example]:
    """The first row of each of `count` tasks: one conversation, then composites, then the others.

    Args:
        outputs: the result of the query of that name
    """
    conversations = [row for row in outputs.rows if row["is_conversation"]]
    others = [row for row in outputs.rows if not row["is_conversation"]]
    found = []
    for row in [*conversations[:1], *others][:count]:
        asked = read_outputs(ledger.blobs.path_of(row["outputs_sha256"]))[0]
        dialogue, reference = None, str(asked.get("reference", ""))
        if row["is_conversation"]:
            dialogue = Dialogue.from_dict(json.loads(asked["asked"]))
            reference = ", then ".join(one.row.response for one in dialogue.questions)
        found.append(
            Example(
                task=row["task"],
                prompt=str(asked["prompt"]),
                reference=reference,
                templated=row["templated"] is not False,
                max_new_tokens=min(MAX_NEW_TOKENS, row["max_new_tokens"]),
                dialogue=dialogue,
                value=next((asked[name] for name in asked if name in JUDGING), None),
                system_prompt=row["system_prompt"],
                is_whole="asked" not in asked,
            )
        )
    return found


def trace_examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """A `trace_figure` of each example, which the model answers again."""
    drawn = []
    with bar("tracing examples", len(examples), "prompts") as advance:
        for number, example in enumerate(examples):
            found = _trace(model, tokenizer, example)
            drawn.append(trace_figure(found, f"trace-{number}", example.caption))
            advance(1)
    return drawn


def _trace(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, example: Example) -> Trace:
    if example.dialogue is None:
        asked = _as_measured(tokenizer, example)
        return trace(model, tokenizer, asked, max_new_tokens=example.max_new_tokens)
    chat = Chat(model, tokenizer)
    answers: list[str] = []
    for _ in example.dialogue.questions:
        messages = example.dialogue.with_answers(answers).messages()
        answers.append(chat.answer(messages, max_new_tokens=example.max_new_tokens).text)
    return chat.trace()


def _as_measured(tokenizer: PreTrainedTokenizerBase, example: Example) -> str | list[int]:
    """The prompt as it was asked when it was measured; a text goes into the chat template."""
    if example.is_whole or not example.templated:
        # a template writes its own special tokens
        return encode_text(tokenizer, example.prompt, add_special_tokens=not example.templated)
    if example.system_prompt is None:
        return example.prompt
    system = {"role": "system", "content": example.system_prompt}
    return encode_messages(tokenizer, [system, {"role": "user", "content": example.prompt}])
