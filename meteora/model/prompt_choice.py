"""Choose one expert for a whole prompt: the one with unusually large updates. No examples needed.

Before a pass that holds a prompt, the base alone reads that pass. At each module an expert's update
of a token x has the size

    size_c(x) = log ‖R_c A_c (Σ + λ I)^-½ (x - μ)‖,   s_c B_c = Q_c R_c

with the mean μ and the covariance Σ of the base's own inputs there, on background texts. Training
moves the rows of A along the inputs that it sees; whitening makes directions that all texts share
as small as the others. The mean over the prompt's tokens and the expert's modules is compared with
its expected value, given the other experts' sizes; a, b and d come from the background texts:

    logit_c = (size_c - a_c - b_c · mean of the others' sizes) / d_c

All tokens of the turn have these logits, the answer's too. So this router is not causal: it needs
the question in one pass.
"""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from meteora.routing.layer import routed_layers
from meteora.routing.passes import (
    CACHES,
    Present,
    UnreadPromptError,
    Watcher,
    by_name,
    set_watcher,
)
from meteora.routing.prompt_router import HeldChoice, PromptRouter
from meteora.routing.turns import ask, each_row, unread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.artifacts import RouterOptions
    from meteora.base.chat_template import Template
    from meteora.checkpoint.tensors import PromptGates

OUTPUTS = {"labels", "output_hidden_states", "output_attentions", "return_dict"}
"""Arguments of a pass about its outputs, which `PromptReader.read` does not use."""


def insert_prompt_routers(
    model: PreTrainedModel, gates: PromptGates, options: RouterOptions
) -> None:
    """Give every routed layer a `PromptRouter`, and the model a `PromptReader` that decides."""
    held = HeldChoice()
    for path, layer in routed_layers(model).items():
        router = PromptRouter(gates.rows[path], gates.offsets[path], layer.stack, options, held)
        layer.router = router.to(layer.device)
    set_watcher(model, PromptReader(gates.template, gates.standard, held))


class PromptReader(Watcher):
    """Reads each prompt with the base before it is routed, and decides for its sequence."""

    def __init__(self, template: Template, standard: Tensor, held: HeldChoice) -> None:
        self.template, self.standard, self.held = template, standard, held
        self.now = Present()

    def stop(self) -> None:
        super().stop()
        self._hold(None)

    def _hold(self, logits: Tensor | None) -> None:
        """Route by these logits of sequences [B, C] in this thread."""
        self.held.logits, self.held.on = logits, {}

    def _looks_ahead(self) -> bool:
        """Whether a prompt is read: not where all layers have been lent another router."""
        return any(isinstance(layer.router, PromptRouter) for layer in self._layers)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.held.measure is not None:
            return  # this pass is the reading itself
        arguments = by_name(model, args, kwargs)
        if (seen := self.input_of(arguments)) is None:
            return
        self.refuse_packed()
        conversation = self.follow(seen)
        turns = ask(conversation, seen, self.template)
        if (logits := conversation.held.get(0)) is not self.held.logits:
            self._hold(logits)
        question = turns.asked & (turns.turn == turns.turn[:, -1:])
        asks = question.any(1) & turns.closed
        before = each_row(self.held.logits, len(asks)) if seen.goes_on else None
        if seen.goes_on and not asks.any():
            if before is None:
                raise unread(len(asks), self.held.logits)
            return
        question = torch.where(question.any(1, keepdim=True), question, seen.is_token)
        logits = self.read(model, question, arguments)
        if before is not None:  # a sequence without a question keeps its logits
            logits = logits.where(asks.cpu().unsqueeze(1), before)
        conversation.held[0] = logits
        self._hold(logits)

    @torch.no_grad()
    def read(self, model: nn.Module, question: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run a pass with the base alone; returns the logits of each sequence, [B, C].

        Args:
            question: [B, L] bool: the tokens that decide
            arguments: of the pass, by name; a cache among them does not change
        """
        inputs = {name: value for name, value in arguments.items() if name not in OUTPUTS}
        inputs["use_cache"] = False
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = slice(-1, None)  # they are not used; see `with_every_token`
        for name in CACHES:
            if inputs.get(name) is not None:
                inputs[name] = _copied(inputs[name])
        sizes = torch.zeros(len(question), self.standard.shape[1], dtype=torch.float32)
        num_modules = torch.zeros(self.standard.shape[1], dtype=torch.float32)
        num_tokens = question.sum(1, keepdim=True).clamp_min(1)  # a row of a batch may be empty

        def measure(router: PromptRouter, x: Tensor) -> None:
            tokens = router.sizes(x.reshape(question.numel(), -1)).float()
            tokens = tokens.view(*question.shape, -1)  # [B, L, E]
            counts = question.to(tokens.device).unsqueeze(-1)
            mean = (tokens * counts).sum(1).cpu() / num_tokens.cpu()
            sizes[:, : mean.shape[1]] += mean
            num_modules[: mean.shape[1]] += torch.tensor(router.has)

        self.held.measure = measure
        try:
            model.forward(**inputs)  # not model(...): hooks must not see a second pass
        finally:
            self.held.measure = None
        sizes /= num_modules.clamp_min(1)
        others = torch.zeros_like(sizes)
        num_experts = int(num_modules.count_nonzero())
        others[:, :num_experts] = mean_of_others(sizes[:, :num_experts])
        intercept, slope, deviation = self.standard.cpu()
        return (sizes - intercept - slope * others) / deviation


def _copied(cache: Any) -> Any:  # noqa: ANN401  (of many kinds)
    """A copy of a cache, which the reading may change.

    Raises:
        UnreadPromptError: it cannot be copied, such as an offloaded one.
    """
    try:
        return copy.deepcopy(cache)
    except TypeError as error:
        raise UnreadPromptError(
            f"a router of kind `prompt` reads a prompt twice, and {type(cache).__name__} cannot be"
            " copied for that; choose another cache, such as the usual one"
        ) from error


def mean_of_others(sizes: Tensor) -> Tensor:
    """The mean of sizes [N, E] over the other experts, [N, E]; 0 where there is only one."""
    return (sizes.sum(1, keepdim=True) - sizes) / max(1, sizes.shape[1] - 1)
