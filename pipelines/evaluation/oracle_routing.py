"""Composites answered with what the routed model has to find out: whose text each token is.

    oracle       every token goes to the expert of the question that it belongs to
    one_expert   every token goes to the expert of the first question: one LoRA for a whole prompt

What belongs to nobody, the template and the sentence before the questions, goes to the first too.
While the answer is written, its last number says whose it is.
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


class _Told:
    """Sees every forward pass before its layers do, and says which expert is to have each token."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        composites: Sequence[Composite],
        names: Sequence[str],
        *,
        switches: bool,
    ) -> None:
        self.tokenizer = tokenizer
        self.composites = composites
        self.names = names
        self.switches = switches
        self.decision = Decision()
        self._asked: list[Composite] = []
        """Of each sequence in the batch that is being answered."""
        self._said: list[list[int]] = []
        """The tokens of its answer so far."""

    def before(self, _module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        past = kwargs.get("past_key_values")
        if past is None or past.get_seq_length() == 0:
            mask = kwargs.get("attention_mask")
            there = torch.ones_like(ids) if mask is None else mask
            rows = zip(ids.tolist(), there.tolist(), strict=True)
            experts = self._prompts([(row, sum(is_there)) for row, is_there in rows])
        else:
            experts = [[self._next(i, row)] for i, row in enumerate(ids[:, 0].tolist())]
        chosen = one_hot(torch.tensor(experts, device=ids.device), len(self.names))
        self.decision.hold(chosen.flatten(0, 1).float())  # [T, E]

    def _prompts(self, rows: list[tuple[list[int], int]]) -> list[list[int]]:
        """The expert of every token of prompts that were padded on the left."""
        self._asked, self._said = [], [[] for _ in rows]
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
                    f"the tokenizer splits the prompt {asked.prompt[:60]!r} into {length} tokens,"
                    f" and into {len(owners)} when it reads them back; whose they are is not known"
                )
            first = asked.questions[0].task
            own = [(owner or first) if self.switches else first for owner in owners]
            padded = [first] * (len(row) - length) + own
            experts.append([self.names.index(owner) for owner in padded])
        return experts

    def _next(self, i: int, token: int) -> int:
        """The expert of the next token of sequence `i`."""
        asked, said = self._asked[i].questions, self._said[i]
        said.append(token)
        number = last_number(str(self.tokenizer.decode(said)), len(asked)) if self.switches else 1
        return self.names.index(asked[max(number, 1) - 1].task)


@contextmanager
def told(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    composites: Sequence[Composite],
    system: str,
) -> Generator[None]:
    """The model as `oracle` or `one_expert`, to be asked these composites and nothing else."""
    found = _Told(tokenizer, composites, expert_names(model), switches=system == ORACLE)
    hook = model.base_model.register_forward_pre_hook(found.before, with_kwargs=True)
    try:
        options = RouterOptions(system, top_k=1, temperature=1.0)
        with routed_by(model, lambda layer: Follower(found.decision, layer.num_choices, options)):
            yield
    finally:
        hook.remove()
