"""The routed layer against the bare base and its peers: `python -m tests.benchmarks.layer`.

Three Llama layers with all seven projections routed by random gates (every expert is chosen, the
hardest case), a prefill and one decoded token with its cache. All variants share the base's weights
and take turns in one process; a figure is the ratio to the bare base of the best of all rounds.
Beside each stands its floor, the arithmetic alone: multiplications of the variant's matmuls over
those of the base's. `tests.benchmarks.twins` times single layers over many sizes, and
`tests.benchmarks.model` whole models.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from meteora.routing.layer import routed_layers
from meteora.routing.routers import Gate
from tests.benchmarks import peers, timing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from meteora.kernels.dispatch import KernelName


@dataclass(frozen=True)
class Setting:
    experts: int = 28
    rank: int = 8
    top_k: int = 2
    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 3
    tokens: int = 256


@dataclass(frozen=True)
class Row:
    variant: str
    floor: float
    prefill: float
    decode: float | None
    """None where the variant cannot use a cache."""
    prefill_ms: float
    decode_ms: float | None


def build_base(asked: Setting) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = asked.hidden // 64
    shared = next(n for n in (4, 3, 1) if heads % n == 0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=asked.hidden,
        intermediate_size=asked.intermediate,
        num_hidden_layers=asked.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // shared,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(requires_grad=False)


def floors(base: nn.Module, asked: Setting) -> dict[str, float]:
    """Multiplications a token, over those of the base's linear layers.

    The same for a prefill and for a decoded token, which reads every weight that it multiplies by
    once.
    """
    linear = {p: m for p, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    bare = sum(m.weight.numel() for m in linear.values())
    sizes = [
        (m.in_features, m.out_features)
        for path, m in linear.items()
        if path.rpartition(".")[2] in peers.TARGETS
    ]
    per_rank = sum(num_in + num_out for num_in, num_out in sizes)
    gates = asked.experts * sum(num_in for num_in, _ in sizes)
    every, chosen = asked.experts * asked.rank * per_rank, asked.top_k * asked.rank * per_rank
    return {
        "": 1.0,
        "one": 1 + asked.rank * per_rank / bare,
        "chosen": 1 + (chosen + gates) / bare,
        "every": 1 + (every + gates) / bare,
        "x_lora": 2 + every / bare,
    }


def variants(
    base: PreTrainedModel, asked: Setting, folder: Path, only: Sequence[str] | None = None
) -> dict[str, tuple[nn.Module, str]]:
    """Each variant with the name of its floor."""
    folders = peers.save_adapters(base, folder, asked.experts, asked.rank)
    ours = peers.routed(base, folders, asked.top_k, folder)
    made: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "bare base": (lambda: base, ""),
        "meteora": (lambda: ours, "chosen"),
        "meteora, tokens of one task": (lambda: one_task(ours), "chosen"),
        "meteora, dense": (lambda: by_kernel(ours, "dense"), "every"),
        "meteora, gather": (lambda: by_kernel(ours, "gather"), "chosen"),
        "meteora, grouped": (lambda: by_kernel(ours, "grouped"), "chosen"),
        "one LoRA (PEFT)": (lambda: peers.one_lora(base, folders), "one"),
        "loop over experts": (lambda: peers.with_layers(ours, peers.LoopLinear), "chosen"),
        "bmm of gathered weights": (lambda: peers.with_layers(ours, peers.BmmLinear), "chosen"),
        "Arrow (PEFT)": (lambda: peers.arrow(base, folders, asked.top_k), "every"),
        "X-LoRA (PEFT)": (lambda: peers.x_lora(base, folders, asked.top_k), "x_lora"),
    }
    return timing.built(made, only)


def by_kernel(model: PreTrainedModel, kernel: KernelName) -> PreTrainedModel:
    """The same model, whose layers all compute by one kernel."""
    model = peers.share(model)
    for layer in routed_layers(model).values():
        layer.kernel = kernel
    return model


def one_task(model: PreTrainedModel) -> PreTrainedModel:
    """What a prompt of one task does once gates are trained: all tokens go to the same experts."""
    model = peers.share(model)
    for layer in routed_layers(model).values():
        assert isinstance(layer.router, Gate)
        bias = torch.zeros_like(layer.router.bias.data)
        bias[: layer.router.options.top_k] = 1e6
        gate = Gate(layer.router.weight.data, bias, layer.router.options)
        layer.router = gate.requires_grad_(requires_grad=False)
    return model


def decoder(model: nn.Module, ids: Tensor) -> Callable[[], object]:
    """A step that decodes one token behind `ids`, again and again from the same cache."""
    cache = DynamicCache()
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True)

    def step() -> None:
        model(ids[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


@torch.inference_mode()
def check(found: dict[str, tuple[nn.Module, str]], ids: Tensor) -> None:
    """What computes the same must give the same, or its time means nothing."""
    expected = found["meteora"][0](ids).logits
    for name, (model, _) in found.items():
        if "(PEFT)" not in name and name not in {"bare base", "meteora, tokens of one task"}:
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-2, atol=1e-2)


def measure(
    asked: Setting, rounds: int, device: str, folder: Path, only: Sequence[str] | None = None
) -> list[Row]:
    base = build_base(asked).to(device)
    found = variants(base, asked, folder, only)
    floor_of = floors(base, asked)
    ids = torch.randint(0, 1024, (1, asked.tokens), device=device)
    check(found, ids)
    prefill = timing.best_of(
        {
            name: lambda model=model: model(ids, use_cache=False)
            for name, (model, _) in found.items()
        },
        rounds,
        device,
    )
    decode = timing.best_of(
        {
            name: decoder(model, ids)
            for name, (model, floor) in found.items()
            if floor != "x_lora"  # it asks for a model without a cache
        },
        5 * rounds,
        device,
    )
    return [
        Row(
            variant=name,
            floor=floor_of[floor],
            prefill=prefill[name] / prefill["bare base"],
            decode=decode[name] / decode["bare base"] if name in decode else None,
            prefill_ms=1e3 * prefill[name],
            decode_ms=1e3 * decode[name] if name in decode else None,
        )
        for name, (_, floor) in found.items()
    ]


def as_table(asked: Setting, rows: list[Row]) -> str:
    setting = ", ".join(f"{name} {value}" for name, value in asdict(asked).items())
    names = "variant", "floor", "prefill", "decode", "prefill, ms", "decode, ms"
    cells = [
        (
            row.variant,
            f"{row.floor:.2f}",
            f"{row.prefill:.2f}",
            "no cache" if row.decode is None else f"{row.decode:.2f}",
            f"{row.prefill_ms:.0f}",
            "" if row.decode_ms is None else f"{row.decode_ms:.1f}",
        )
        for row in rows
    ]
    return f"{setting}\n\n{timing.table(names, cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=10)
    timing.ask(parser)
    timing.ask_which(parser)
    asked = vars(parser.parse_args())
    rounds, as_json, device = asked.pop("rounds"), asked.pop("json"), asked.pop("device")
    only = asked.pop("only")
    setting = Setting(**asked)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(setting, rounds, device, Path(folder), only)
    if as_json:
        body = {
            "setting": asdict(setting),
            "machine": timing.machine(device),
            "rows": [asdict(row) for row in rows],
        }
        sys.stdout.write(json.dumps(body, indent=1) + "\n")
    else:
        timing.tell(as_table(setting, rows), device)


if __name__ == "__main__":
    main()
