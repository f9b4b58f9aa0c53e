"""vLLM's linear layers, with experts: vLLM's own method, and then the experts' update.

    apply(layer, x)   y = vLLM's own method ─▶ meteora::add_experts(x, y) adds to y in place

The experts are one custom operator, which torch.compile leaves as it is and CUDA graphs record. Few
and small experts are part of torch.compile's own graph (`FusedExperts.inline`), and some of their
weights a part of the layer's own (`FusedExperts.join`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from meteora.serving.base_order import refuse_another_order
from meteora.serving.fused_experts import Part, ServedExperts, parts_of
from meteora.serving.served_folder import find_served_checkpoint
from meteora.serving.vllm_prompts import (
    Order,
    PromptsEmbeddingMethod,
    define_operator,
    refuse_parts_of_prompts,
)
from meteora.serving.vllm_version import METHOD, UnservableError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.models.utils import WeightsMapper


def _add_experts(x: Tensor, y: Tensor, layer: str, order: Tensor | None) -> None:  # noqa: ARG001
    """Add the update of a layer's experts for x [..., IN] to y [..., OUT], in place.

    Args:
        layer: its name in vLLM's forward context
        order: see `vllm_prompts.Order`
    """
    get_forward_context().no_compile_layers[layer].routed.add(x, y)


define_operator(
    "add_experts(Tensor x, Tensor(a!) y, str layer, Tensor(b!)? order) -> ()", _add_experts
)


class MeteoraConfig(QuantizationConfig):
    """vLLM's quantisation config of a served folder: which layers have experts."""

    def __init__(self) -> None:
        super().__init__()
        self.served: ServedExperts | None = None
        self._path_of: dict[str, str] = {}
        """The module paths of the checkpoint, by those of vLLM."""
        self._found: set[str] = set()
        self.order = Order()

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MeteoraConfig:  # noqa: ARG003  (the folder has it)
        return cls()

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: PretrainedConfig | None = None,  # noqa: ARG002
        revision: str | None = None,
    ) -> None:
        """Find the checkpoint in the served folder, and check that it belongs to the base.

        vLLM calls it once, before any weights are loaded.
        """
        memory = (
            psutil.virtual_memory().available
            if current_platform.is_cpu()
            else current_platform.get_device_total_memory()
        )
        self.served = ServedExperts(find_served_checkpoint(model_name, revision, memory))
        self._path_of = {path: path for path in self.served.manifest.modules}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Use the names that vLLM gives to modules of this architecture."""
        renamed = {}
        for theirs, ours in self._path_of.items():
            renamed |= dict.fromkeys(hf_to_vllm_mapper.apply_list([theirs]), ours)
        self._path_of = renamed

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            return self._embedding_method()
        if isinstance(layer, ParallelLMHead) and prefix in self._path_of:
            raise UnservableError(f"{prefix} has experts, and vLLM's head takes none")
        if not isinstance(layer, LinearBase):
            return None
        parent, _, name = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(name, [name])
        own = [f"{parent}.{one}" if parent else one for one in names]
        if not any(path in self._path_of for path in own):
            return UnquantizedLinearMethod()
        self._found.update(own)
        _refuse_what_is_not_supported(name)
        return ExpertsLinearMethod(self, prefix, names)

    def _embedding_method(self) -> PromptsEmbeddingMethod | None:
        """The method of the embedding, if the gates wait for whole questions."""
        if self.served is None or not self.served.options.by_turns:
            return None
        config = get_current_vllm_config()
        refuse_parts_of_prompts(config)
        scheduler = config.scheduler_config
        turns = self.served.read_turns(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        return PromptsEmbeddingMethod(turns, self.order)

    def parts(self, prefix: str, names: Sequence[str], sizes: Sequence[int]) -> list[Part]:
        """The parts of a layer that have experts, by their paths in the checkpoint."""
        parts = parts_of(prefix.rpartition(".")[0], names, sizes)
        return [
            part._replace(path=self._path_of[part.path])
            for part in parts
            if part.path in self._path_of
        ]

    def experts(self) -> ServedExperts:
        """The experts, once all layers are built.

        Raises:
            UnservableError: a module with experts is no linear layer of vLLM's model.
        """
        if self.served is None:
            raise UnservableError("vLLM has not said which folder is served; serve it by its path")
        if missing := sorted(self._path_of.keys() - self._found):
            raise UnservableError(
                f"{self.served.folder}: {len(missing)} modules with experts are not linear layers"
                f" of this model in vLLM, such as {missing[0]}; drop the experts that target them"
            )
        return self.served


def _refuse_what_is_not_supported(name: str) -> None:
    """Refuse settings with which experts would get only a part of an input, or none."""
    config = get_current_vllm_config()
    parallel = config.parallel_config
    for kind in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (size := getattr(parallel, kind)) > 1:
            raise UnservableError(
                f"{kind} is {size}, and gates read whole inputs on one device; set it to 1, and"
                " data_parallel_size for more devices"
            )
    if name == "kv_b_proj" and config.model_config.use_mla:
        raise UnservableError(
            "this model multiplies kv_b_proj into its attention, where experts have no effect;"
            " set VLLM_MLA_DISABLE=1"
        )


class VllmLinear(torch.nn.Module):
    """A linear layer with the matmul of vLLM's own layers, which may pack the weight."""

    def __init__(self, weight: Tensor) -> None:
        """Take the weight [OUT, IN]."""
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.method = UnquantizedLinearMethod()
        self.method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x)


@register_weight_loader_v2_supported_method
class ExpertsLinearMethod(UnquantizedLinearMethod):
    """The method of one layer that has experts."""

    supports_pre_processed_weights = False  # they have the experts' rows already

    def __init__(self, config: MeteoraConfig, prefix: str, names: Sequence[str]) -> None:
        """Take the layer's path in vLLM, and the names of the modules that the layer joins."""
        super().__init__()
        self.config, self.prefix, self.names = config, prefix, names
        self.key = f"{prefix}.experts"
        """The layer's name in vLLM's forward context."""
        self.sizes: list[int] = []

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *sizes: Any,  # noqa: ANN401
        **extra: Any,  # noqa: ANN401
    ) -> None:
        super().create_weights(
            layer, input_size_per_partition, output_partition_sizes, *sizes, **extra
        )
        self.sizes = output_partition_sizes
        context = get_current_vllm_config().compilation_config.static_forward_context
        context[self.key] = layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Load the layer's experts to the device of its weight."""
        served = self.config.experts()
        parts = self.config.parts(self.prefix, self.names, self.sizes)
        weight = layer.get_parameter("weight").data
        for part in parts:
            rows = weight[part.start : part.end]
            refuse_another_order(served.folder.parent, part.path, rows)
        with set_default_torch_dtype(torch.float32):  # vLLM sets the model's dtype here
            layer.routed = routed = served.build(parts, weight, VllmLinear)
        if (joined := routed.join(weight)) is not weight:
            replace_parameter(layer, "weight", joined)  # a new one, so that vLLM offloads it again
        order = self.config.order.on(weight.device) if served.in_order(parts) else None
        layer.register_buffer("order", order, persistent=False)
        super().process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        routed: Any = layer.routed
        if bias is not None and routed.num_joined:
            bias = torch.nn.functional.pad(bias, (0, routed.num_joined))
        y = super().apply(layer, x, bias)
        if routed.inline:
            return routed.add(x, y)
        torch.ops.meteora.add_experts(x, y, self.key, layer.order)
        return y
