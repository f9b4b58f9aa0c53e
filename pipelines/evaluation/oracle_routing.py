"""Controls for composites that know the question of each token, which a router has to find out.

    oracle       every token goes to the expert of the question that it belongs to
    one_expert   every token goes to the expert of the first question: one LoRA for a whole prompt

Tokens of no question, which are the template's and the sentence before the questions, go to the
expert of the first question. While the model answers, the last number that it wrote at the start of
a line names the question.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import one_hot

from meteora.artifacts import MeteoraError, RouterOptions
from meteora.model.fused import expert_names, routed_by
from meteora.routing.routers import Decision, Follower
from pipelines.data.composites import last_number, prompt_owners
from pipelines.evaluation.measurements import ORACLE

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.composites import Composite


class OracleRouting:
    """Finds the expert of each token of a forward pass before the layers run."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        composites: Sequence[Composite],
        names: Sequence[str],
        *,
        switches: bool,
    ) -> None:
        """Prepare for prompts that are these composites, and no others.

        Args:
            names: of all experts, in order
            switches: whether each question has its own expert; otherwise all have the first one's
        """
        self.tokenizer = tokenizer
        self.composites = composites
        self.names = names
        self.switches = switches
        self.decision = Decision()
        self._asked: list[Composite] = []
        """The composite of each sequence in the batch that is being answered."""
        self._answers: list[list[int]] = []
        """The tokens of each sequence's answer so far."""

    def set_experts(self, _module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A pre-hook of the base model: sets the experts of the tokens that come in.

        Raises:
            MeteoraError: a prompt is none of the composites, or its tokens cannot be assigned.
        """
        ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        past = kwargs.get("past_key_values")
        if past is None or past.get_seq_length() == 0:
            mask = kwargs.get("attention_mask")
            there = torch.ones_like(ids) if mask is None else mask
            rows = zip(ids.tolist(), there.tolist(), strict=True)
            experts = self._prompt_experts([(row, sum(is_there)) for row, is_there in rows])
        else:
            experts = [[self._next_expert(i, row)] for i, row in enumerate(ids[:, 0].tolist())]
        chosen = one_hot(torch.tensor(experts, device=ids.device), len(self.names))
        self.decision.hold(chosen.flatten(0, 1).float())  # [T, E]

    def _prompt_experts(self, rows: list[tuple[list[int], int]]) -> list[list[int]]:
        """The expert of every token of each prompt.

        Args:
            rows: of each prompt the ids, padded on the left, and how many are not padding
        """
        self._asked, self._answers = [], [[] for _ in rows]
        experts = []
        for row, length in rows:
            text = str(self.tokenizer.decode(row[len(row) - length :]))
            asked = next((one for one in self.composites if one.prompt in text), None)
            if asked is None:
                raise MeteoraError(f"the prompt {text[:60]!r} is none of the task's composites")
            self._asked.append(asked)
            owners = prompt_owners(self.tokenizer, asked, text)
            if len(owners) != length:
                raise MeteoraError(
                    f"the prompt {asked.prompt[:60]!r} has {length} tokens, but {len(owners)} when"
                    " its text is tokenized again, so their questions are not known; leave `oracle`"
                    " and `one_expert` out of `compare`, or the composites out of the benchmark"
                )
            first = asked.questions[0].task
            own = [(owner or first) if self.switches else first for owner in owners]
            padded = [first] * (len(row) - length) + own
            experts.append([self.names.index(owner) for owner in padded])
        return experts

    def _next_expert(self, i: int, token: int) -> int:
        """The expert of the token that sequence `i` now has at its end."""
        asked, answer = self._asked[i].questions, self._answers[i]
        answer.append(token)
        number = last_number(str(self.tokenizer.decode(answer)), len(asked)) if self.switches else 1
        return self.names.index(asked[max(number, 1) - 1].task)


@contextmanager
def use_oracle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    composites: Sequence[Composite],
    system: str,
) -> Generator[None]:
    """The model as `oracle` or `one_expert`, until the context ends.

    Args:
        composites: the only prompts that it may get in this context
        system: `oracle` or `one_expert`
    """
    routing = OracleRouting(tokenizer, composites, expert_names(model), switches=system == ORACLE)
    hook = model.base_model.register_forward_pre_hook(routing.set_experts, with_kwargs=True)
    try:
        options = RouterOptions(system, top_k=1, temperature=1.0)
        with routed_by(model, lambda layer: Follower(routing.decision, layer.num_choices, options)):
            yield
    finally:
        hook.remove()
