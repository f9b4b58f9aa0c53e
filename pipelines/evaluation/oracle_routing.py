"""Controls that know the right expert of each token; a router must find it out.

All of them use `send_to`. The controls for conversations are in `conversations`; for composites:

    oracle       every token goes to the expert of its question
    one_expert   every token goes to the expert of the first question: one LoRA for a whole prompt

Tokens of no question (the template's, and the sentence before the questions) go to the expert of
the first question. An answer's tokens belong to the question whose number the model wrote last at
the start of a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from meteora.artifacts import NULL, MeteoraError, RouterOptions
from meteora.model.fused import expert_names
from meteora.routing.layer import routed_by
from meteora.routing.passes import PassInput
from meteora.routing.routers import Decision, Follower
from pipelines.data.composites import Composite, last_number
from pipelines.evaluation.measurements import ORACLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class _GivenRoutes(Follower):
    """Uses routes that another part of the program sets for a whole pass."""

    @property
    def is_causal(self) -> bool:
        return False


@contextmanager
def send_to(
    model: PreTrainedModel,
    experts_of: Callable[[Tensor, dict[str, Any]], Sequence[Sequence[str]]],
) -> Generator[None]:
    """Route every token to a given expert, in every layer, until the context ends.

    Args:
        experts_of: called before each pass with its ids [B, L] and the other arguments of the base
            model; returns the name of each token's expert, [B][L]. `(base)` is the base alone,
            also if the router does not have this choice.
    """
    names, decision = expert_names(model), Decision()
    options = RouterOptions(ORACLE, top_k=1, temperature=1.0)

    def decide(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        experts = [name for row in experts_of(ids, kwargs) for name in row]
        no_base = NULL not in names  # then the base is an expert of weight 0
        places = [0 if no_base and name == NULL else names.index(name) for name in experts]
        chosen = torch.tensor(places, device=ids.device)  # [T]
        decision.logits = one_hot(chosen, len(names)).float()
        weights = [float(not (no_base and name == NULL)) for name in experts]
        decision.routes = torch.tensor(weights, device=ids.device)[:, None], chosen[:, None]

    with (
        model.base_model.register_forward_pre_hook(decide, with_kwargs=True),
        routed_by(model, lambda layer: _GivenRoutes(decision, layer.num_choices, options)),
    ):
        yield


@dataclass(eq=False)
class OracleRouting:
    """Finds the expert of each token of composites and their answers."""

    tokenizer: PreTrainedTokenizerBase
    composites: Sequence[Composite]
    """The only possible prompts."""
    switches: bool
    """Whether each question has its own expert; otherwise all have the first one's."""
    _batch: list[Composite] = field(default_factory=list, init=False)
    """The composite of each sequence in the present batch."""
    _answers: list[list[int]] = field(default_factory=list, init=False)
    """The tokens of each sequence's answer so far."""
    _times: Counter[str] = field(default_factory=Counter, init=False)
    """The number of times that each prompt came."""

    def experts_of(self, ids: Tensor, kwargs: dict[str, Any]) -> list[list[str]]:
        """The expert of each token of a pass, for `send_to`.

        Raises:
            MeteoraError: a prompt is none of the composites, or its tokens cannot be assigned.
        """
        seen = PassInput.of(kwargs | {"input_ids": ids})
        if seen.goes_on:
            return [[self._next_expert(i, row)] for i, row in enumerate(ids[:, 0].tolist())]
        rows = zip(ids.tolist(), seen.is_token.tolist(), strict=True)
        return self._prompt_experts([(row, sum(is_there)) for row, is_there in rows])

    def _prompt_experts(self, rows: list[tuple[list[int], int]]) -> list[list[str]]:
        """The experts of prompts: ids, padded on the left, and their number without padding."""
        self._batch, self._answers = [], [[] for _ in rows]
        experts = []
        for row, length in rows:
            text = str(self.tokenizer.decode(row[len(row) - length :]))
            composite = self._composite_in(text)
            self._batch.append(composite)
            owners = composite.prompt_owners(self.tokenizer, text)
            if len(owners) != length:
                raise MeteoraError(
                    f"the prompt {composite.prompt[:60]!r} has {length} tokens, but {len(owners)}"
                    " when its text is tokenized again, so their questions are not known; leave"
                    " `oracle` and `one_expert` out of `compare`, or the composites out of the"
                    " benchmark"
                )
            first = composite.questions[0].task
            own = [(owner or first) if self.switches else first for owner in owners]
            experts.append([first] * (len(row) - length) + own)
        return experts

    def _composite_in(self, text: str) -> Composite:
        """The composite of a text; composites with equal prompts but other experts take turns."""
        inside = [one for one in self.composites if one.prompt in text]
        if not inside:
            raise MeteoraError(f"the prompt {text[:60]!r} is none of the task's composites")
        prompt = max((one.prompt for one in inside), key=len)  # one may be the beginning of another
        alike = [one for one in inside if one.prompt == prompt]
        self._times[prompt] += 1
        return alike[(self._times[prompt] - 1) % len(alike)]

    def _next_expert(self, i: int, token: int) -> str:
        """The expert of the next token, which sequence `i` gets now."""
        questions, answer = self._batch[i].questions, self._answers[i]
        answer.append(token)
        text = str(self.tokenizer.decode(answer))
        number = last_number(text, len(questions)) if self.switches else 1
        return questions[max(number, 1) - 1].task


def use_oracle(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    composites: Sequence[Composite],
    system: str,
) -> AbstractContextManager[None]:
    """The model as `oracle` or `one_expert` for prompts of these composites, in a context."""
    routing = OracleRouting(tokenizer, composites, switches=system == ORACLE)
    return send_to(model, routing.experts_of)
