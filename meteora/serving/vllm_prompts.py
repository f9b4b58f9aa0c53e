"""vLLM's embedding, which shows the tokens of each pass to gates that wait for whole questions.

    embedding(layer, ids)   meteora::read_prompts(ids) ─▶ the request of each token
                            vLLM's own method

It is the first layer of a model and the only one that sees token ids. vLLM's attention metadata
tell where each request begins in a pass. The first block of its keys and values identifies a
request while it runs, since no two requests share a cached prefix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.library import Library
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import ForwardContext, get_forward_context
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from meteora.serving.served_folder import WHOLE_PROMPTS
from meteora.serving.served_turns import Requests, ServedTurns
from meteora.serving.vllm_version import UnservableError

if TYPE_CHECKING:
    from vllm.config import VllmConfig


KEY = "meteora.prompts"
"""The embedding's name in vLLM's forward context."""

_LIBRARY = Library("meteora", "FRAGMENT")
"""Our operators, `torch.ops.meteora`."""


def define_operator(schema: str, compute: Callable[..., None]) -> None:
    """Define a custom operator that returns nothing, and that torch.compile leaves as it is."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, compute, device)
    _LIBRARY._register_fake(name, lambda *_: None)


def _read_prompts(ids: Tensor, layer: str, order: Tensor, tables: list[Tensor]) -> None:  # noqa: ARG001
    """Look at the tokens [T] of a pass.

    Args:
        layer: the embedding's name in vLLM's forward context
        order: see `Order`
        tables: the tensors of its `turns`, which are written
    """
    context = get_forward_context()
    context.no_compile_layers[layer].turns.see(ids.flatten(), _requests_of(context))


define_operator(
    "read_prompts(Tensor ids, str layer, Tensor(a!) order, Tensor(b!)[] tables) -> ()",
    _read_prompts,
)


class Order:
    """A tensor that keeps operators in order; its content does not matter.

    Two operators that share state outside of their arguments both declare that they write this
    tensor. So torch.compile keeps both, in their order.
    """

    def __init__(self) -> None:
        self._tensor = torch.zeros(1)  # on the CPU: the config with it is sent to other processes

    def on(self, device: torch.device) -> Tensor:
        """The tensor on the model's device."""
        self._tensor = self._tensor.to(device)
        return self._tensor


def _requests_of(context: ForwardContext) -> Requests | None:
    """The requests of a pass; None in a trial pass, with which vLLM measures memory.

    Raises:
        UnservableError: every layer's attention has a sliding window, which drops the first block
            of a request, or the attention backend does not tell where requests begin.
    """
    if not isinstance(by_layer := context.attn_metadata, dict) or not by_layer:
        return None
    for name, metadata in by_layer.items():
        if getattr(context.no_compile_layers[name], "sliding_window", 0) is None:
            try:
                fields = (metadata.query_start_loc, metadata.seq_lens, metadata.block_table[:, 0])
            except AttributeError as error:
                raise UnservableError(
                    f"{type(metadata).__name__} does not tell where requests begin, which the gates"
                    " of this model have to know; choose another --attention-backend"
                ) from error
            return Requests(*(numbers.tolist() for numbers in fields))
    raise UnservableError(
        "each layer of this model attends to a sliding window alone, so that vLLM forgets where a"
        " request began; set `router: {share: point}` in the recipe"
    )


def refuse_parts_of_prompts(config: VllmConfig) -> None:
    """Refuse settings with which a prompt is not computed whole, in one pass."""
    cache, scheduler, model = config.cache_config, config.scheduler_config, config.model_config
    if (
        cache.enable_prefix_caching
        or scheduler.enable_chunked_prefill
        or config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
    ):
        raise UnservableError(
            "the gates of this model wait for whole questions, so prefix cache, chunked prefill and"
            f" CUDA graphs have to be off; serve it with {WHOLE_PROMPTS}"
        )
    settings = {
        "long_prefill_token_threshold": scheduler.long_prefill_token_threshold,
        "speculative_config": config.speculative_config,
        "kv_transfer_config": config.kv_transfer_config,
        "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
        "enable_dbo": config.parallel_config.enable_dbo,
        "ubatch_size": config.parallel_config.ubatch_size > 1,
        "enable_prompt_embeds": model.enable_prompt_embeds,
    }
    for name, value in settings.items():
        if value:
            raise UnservableError(
                f"{name} is set, by which vLLM computes prompts in other ways than the gates of"
                " this model, which wait for whole questions, can follow; leave it out"
            )
    if model.is_multimodal_model:
        raise UnservableError(
            "this model takes images, too, so vLLM turns prompts into vectors before the gates see"
            " their tokens; set `router: {share: point}` in the recipe"
        )


class PromptsEmbeddingMethod(UnquantizedEmbeddingMethod):
    """The method of the embedding of a model whose gates wait for whole questions."""

    def __init__(self, turns: ServedTurns, order: Order) -> None:
        super().__init__()
        self.turns, self.order = turns, order

    def create_weights(self, layer: torch.nn.Module, *sizes: int, **extra: object) -> None:
        super().create_weights(layer, *sizes, **extra)
        get_current_vllm_config().compilation_config.static_forward_context[KEY] = layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        super().process_weights_after_loading(layer)
        device = layer.get_parameter("weight").device
        layer.turns, order = self.turns.to(device), self.order.on(device)
        layer.register_buffer("order", order, persistent=False)

    def embedding(self, layer: torch.nn.Module, input_: Tensor) -> Tensor:
        turns: Any = layer.turns
        torch.ops.meteora.read_prompts(input_, KEY, layer.order, turns.tables)
        return super().embedding(layer, input_)
