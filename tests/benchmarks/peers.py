"""What the routed layer is compared with: PEFT's own methods, and two formulations of others.

`LoopLinear` computes one expert after the other, as mixtures of experts first did; `BmmLinear`
gathers a private A and B for each token and expert and multiplies them in a batch, as MeteoRA's
paper describes its accelerated forward. Both are written from that description.
"""

from __future__ import annotations

import copy
import warnings
from abc import abstractmethod
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora import ArrowConfig, create_arrow_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from meteora.adapters import reader
from meteora.adapters.weights import AdapterWeights
from meteora.artifacts import RouterOptions
from meteora.checkpoint import manifest
from meteora.checkpoint.stack import module_entries, stack_adapters
from meteora.model.fused import EXPERTS, insert_layer
from meteora.routing.layer import routed_layers
from meteora.routing.routers import Gate

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from meteora.routing.layer import MoELoRALinear

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextmanager
def quiet() -> Generator[None]:
    """PEFT and transformers disagree about names that are going away; it is no news here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def share(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that has the same tensors and not copies of them."""
    memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def save_adapters(base: PreTrainedModel, folder: Path, num_experts: int, r: int) -> list[Path]:
    """Adapters with random A and B on all seven projections, as PEFT saves them."""
    with quiet():
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = get_peft_model(share(base), config)
        for e in range(num_experts):
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter, std=0.02)
            model.save_pretrained(str(folder / str(e)))
    return [folder / str(e) for e in range(num_experts)]


def of_one_shape(adapters: Sequence[Path], out: Path) -> list[Path]:
    """The same adapters as PEFT's own mixtures want them: one rank, the same modules.

    A gets rows of zeros and B columns of them, up to the largest rank; a module that an adapter
    lacks is zeros. The scaling is in B, in 32 bits.
    """
    read = [reader.read(folder) for folder in adapters]
    entries = module_entries([adapter.spec for adapter in read])
    r = max(max(entry.ranks) for entry in entries.values())
    config = LoraConfig(r=r, lora_alpha=r, target_modules=list(entries), task_type="CAUSAL_LM")
    for e, adapter in enumerate(read):
        tensors = {}
        with AdapterWeights(adapter) as weights:
            for path, entry in entries.items():
                a, b = torch.zeros(r, entry.in_features), torch.zeros(entry.out_features, r)
                if names := adapter.tensors.get(path):
                    own_a, own_b = weights.factors(names)
                    a[: len(own_a)], b[:, : len(own_a)] = own_a, own_b.float() * entry.scaling[e]
                tensors |= {
                    f"base_model.model.{path}.lora_{factor}.weight": tensor
                    for factor, tensor in (("A", a), ("B", b))
                }
        folder = out / str(e)
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors")
    return [out / str(e) for e in range(len(adapters))]


def one_lora(base: PreTrainedModel, adapters: Sequence[Path]) -> nn.Module:
    with quiet():
        return PeftModel.from_pretrained(share(base), adapters[0]).eval()


def arrow(base: PreTrainedModel, adapters: Sequence[Path], top_k: int) -> nn.Module:
    with quiet():
        paths = [str(path) for path in adapters]
        return create_arrow_model(share(base), paths, ArrowConfig(top_k=top_k)).eval()


def x_lora(base: PreTrainedModel, adapters: Sequence[Path], top_k: int) -> nn.Module:
    """X-LoRA asks for a model without a cache, and runs it twice."""
    model = share(base)
    model.config = copy.deepcopy(model.config)
    model.config.use_cache = False
    with quiet():
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            adapters={str(e): str(path) for e, path in enumerate(adapters)},
            top_k_lora=top_k,
        )
        return get_peft_model(model, config).eval()


def routed(
    base: PreTrainedModel, adapters: Sequence[Path], top_k: int, work: Path
) -> PreTrainedModel:
    """Ours: stacked, inserted, and routed by random gates, so that every expert is chosen."""
    read = [reader.read(folder) for folder in adapters]
    specs = [adapter.spec for adapter in read]
    if not (work / manifest.EXPERTS).exists():
        stack_adapters(read, work / manifest.EXPERTS)
    with safe_open(work / manifest.EXPERTS, framework="pt") as file:
        model = share(base)
        setattr(model, EXPERTS, [str(e) for e in range(len(specs))])
        for path, entry in module_entries(specs).items():
            a, b = (file.get_tensor(f"{path}.lora_{factor}") for factor in "AB")
            insert_layer(model, path, a, b, entry)
    for layer in routed_layers(model).values():
        size = (len(specs), layer.stack.a.shape[1])
        gate = Gate(torch.randn(size), torch.zeros(len(specs)), RouterOptions("gate", top_k, 1.0))
        layer.router = gate.to(layer.weight.device).requires_grad_(requires_grad=False)
    return model.eval()


def with_layers(model: PreTrainedModel, kind: type[_Peer]) -> nn.Module:
    """The same routes and experts as `routed`, computed as `kind` does."""
    other = share(model)
    for path, layer in routed_layers(other).items():
        parent, _, name = path.rpartition(".")
        setattr(other.get_submodule(parent), name, kind(layer))
    return other


class _Peer(nn.Module):
    """Another forward for the experts of a routed layer; all experts have one rank here."""

    a: Tensor
    b: Tensor

    def __init__(self, layer: MoELoRALinear) -> None:
        super().__init__()
        self.projection, self.router = layer.projection, layer.router
        num_experts, r = layer.num_choices, layer.stack.ranks[0]
        self.register_buffer("a", layer.stack.a.unflatten(0, (num_experts, r)))  # [E, r, IN]
        b = layer.stack.b.unflatten(1, (num_experts, r)).movedim(1, 0)
        self.register_buffer("b", b.contiguous() * layer.stack.scaling[0])  # [E, OUT, r]

    @property
    def weight(self) -> Tensor:
        return self.projection.weight  # ty: ignore[invalid-explicit-return]

    def forward(self, x: Tensor) -> Tensor:
        y, tokens, router = self.projection(x), x.reshape(-1, x.shape[-1]), self.router
        assert router is not None
        weights, experts = router.choose(tokens)
        return y + self.delta(tokens, weights, experts).view(y.shape)

    @abstractmethod
    def delta(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """What the experts add, [T, OUT]."""


class LoopLinear(_Peer):
    def delta(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        out = x.new_zeros(len(x), self.b.shape[1])
        for e, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            tokens, k = torch.where(experts == e)
            if len(tokens):
                added = x[tokens] @ a.T @ b.T
                out.index_add_(0, tokens, added * weights[tokens, k, None])
        return out


class BmmLinear(_Peer):
    def delta(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        a, b = self.a[experts], self.b[experts]  # [T, K, r, IN], [T, K, OUT, r]
        shrunk = a @ x[:, None, :, None]  # [T, K, r, 1]
        return ((b @ shrunk).squeeze(-1) * weights[..., None]).sum(1)
