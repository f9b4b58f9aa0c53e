"""A whole routed model against its base and its peers: `python -m tests.benchmarks.model`.

A real base (`--base FOLDER`) or a made-up Llama, made-up adapters on all seven projections, and for
each variant a prefill, one decoded token with its cache, and a whole answer of `generate`, prefill
included. Ratios to the bare base in one run, as `tests.benchmarks.layer` takes them there.

    meteora               one gate and one first matmul for the modules of one input, as fitted by
                          `meteora run`
    … tokens of one task  the same, all tokens going to the same experts, as those of a prompt do
    … matmuls apart       the same gates, and nothing shared but the decision
    … a gate a module     the paper's way

Every other gate is random, so that each token goes elsewhere: the hardest case.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from meteora.routing.gates import share_first_matmuls
from meteora.routing.layer import routed_layers
from meteora.routing.routers import Decision, Follower, Gate
from tests.benchmarks import layer as three_layers
from tests.benchmarks import peers, timing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

POINTS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Modules that read one input: those behind the first follow its gate."""


@dataclass(frozen=True)
class Row:
    variant: str
    floor: float
    prefill: float
    decode: float | None
    """None where the variant cannot use a cache."""
    generate: float | None
    prefill_ms: float
    decode_ms: float | None
    generate_ms: float | None


def a_gate_a_point(model: PreTrainedModel, *, shared: bool = True) -> PreTrainedModel:
    """The same model, whose modules of one input follow the first's gate."""
    model, decisions, follows = peers.share(model), {}, {}
    for path, layer in routed_layers(model).items():
        parent, _, name = path.rpartition(".")
        router = layer.router
        assert isinstance(router, Gate)
        for first, *others in POINTS:
            if name == first:
                decisions[parent] = router.decision = Decision()
            elif name in others:
                layer.router = Follower(decisions[parent], layer.num_choices, router.options)
                follows[path] = f"{parent}.{first}"
    if shared:
        share_first_matmuls(routed_layers(model), follows)
    return model


def variants(
    base: PreTrainedModel,
    asked: three_layers.Setting,
    folder: Path,
    only: Sequence[str] | None = None,
) -> dict[str, tuple[nn.Module, str]]:
    """Each variant with the name of its floor."""
    folders = peers.save_adapters(base, folder, asked.experts, asked.rank)
    by_module = peers.routed(base, folders, asked.top_k, folder)
    made: dict[str, tuple[Callable[[], nn.Module], str]] = {
        "bare base": (lambda: base, ""),
        "meteora": (lambda: a_gate_a_point(by_module), "chosen"),
        "meteora, tokens of one task": (
            lambda: a_gate_a_point(three_layers.one_task(by_module)),
            "chosen",
        ),
        "meteora, matmuls apart": (lambda: a_gate_a_point(by_module, shared=False), "chosen"),
        "meteora, a gate a module": (lambda: by_module, "chosen"),
        "one LoRA (PEFT)": (lambda: peers.one_lora(base, folders), "one"),
        "loop over experts": (lambda: peers.with_layers(by_module, peers.LoopLinear), "chosen"),
        "bmm of gathered weights": (
            lambda: peers.with_layers(by_module, peers.BmmLinear),
            "chosen",
        ),
        "Arrow (PEFT)": (lambda: peers.arrow(base, folders, asked.top_k), "every"),
        "X-LoRA (PEFT)": (lambda: peers.x_lora(base, folders, asked.top_k), "x_lora"),
    }
    return timing.built(made, only)


def answering(model: Any, ids: Tensor, num_tokens: int) -> Callable[[], object]:
    """A whole answer: the prefill, and so many tokens."""
    settings = copy.deepcopy(model.generation_config)
    settings.update(
        max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=0
    )
    mask = torch.ones_like(ids)
    return lambda: model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)


def measure(base: PreTrainedModel, asked: argparse.Namespace, folder: Path) -> list[Row]:
    setting = three_layers.Setting(experts=asked.experts, rank=asked.rank, top_k=asked.top_k)
    found = variants(base, setting, folder, asked.only)
    floor_of = three_layers.floors(base, setting)
    ids = torch.randint(3, base.config.vocab_size, (asked.batch, asked.tokens), device=asked.device)
    cached = {name: model for name, (model, floor) in found.items() if floor != "x_lora"}
    prefill, decode, generate = (
        timing.best_of(runs, rounds, asked.device, limit_seconds=asked.seconds)
        for runs, rounds in (
            (
                {
                    name: lambda model=model: model(ids, use_cache=False)
                    for name, (model, _) in found.items()
                },
                asked.rounds,
            ),
            (
                {n: three_layers.decoder(model, ids) for n, model in cached.items()},
                5 * asked.rounds,
            ),
            ({n: answering(model, ids, asked.new) for n, model in cached.items()}, asked.rounds),
        )
    )

    def told(times: dict[str, float], name: str) -> tuple[float | None, float | None]:
        if name not in times:
            return None, None
        return times[name] / times["bare base"], 1e3 * times[name]

    rows = []
    for name, (_, floor) in found.items():
        decode_ratio, decode_ms = told(decode, name)
        generate_ratio, generate_ms = told(generate, name)
        rows.append(
            Row(
                variant=name,
                floor=floor_of[floor],
                prefill=prefill[name] / prefill["bare base"],
                decode=decode_ratio,
                generate=generate_ratio,
                prefill_ms=1e3 * prefill[name],
                decode_ms=decode_ms,
                generate_ms=generate_ms,
            )
        )
    return rows


def as_table(rows: list[Row]) -> str:
    names = ("variant", "floor", "prefill", "decode", "generate")
    cells = [
        (
            row.variant,
            f"{row.floor:.2f}",
            f"{row.prefill:.2f} ({row.prefill_ms:,.0f} ms)",
            "no cache" if row.decode is None else f"{row.decode:.2f} ({row.decode_ms:,.1f} ms)",
            "" if row.generate is None else f"{row.generate:.2f} ({row.generate_ms:,.0f} ms)",
        )
        for row in rows
    ]
    return timing.table(names, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", help="a folder of a Llama or the like; made up without it")
    parser.add_argument("--hidden", type=int, default=2048, help="of the made-up one")
    parser.add_argument("--intermediate", type=int, default=5632, help="of the made-up one")
    parser.add_argument("--layers", type=int, default=16, help="of the made-up one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--experts", type=int, default=28)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=10, help="at most")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="about, for each of the three columns"
    )
    timing.ask(parser)
    timing.ask_which(parser)
    asked = parser.parse_args()
    if asked.base:
        base = AutoModelForCausalLM.from_pretrained(asked.base, dtype=asked.dtype)
    else:
        sizes = {name: getattr(asked, name) for name in ("hidden", "intermediate", "layers")}
        base = three_layers.build_base(three_layers.Setting(**sizes))
    base = base.to(asked.device, getattr(torch, asked.dtype)).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(base, asked, Path(folder))
    setting = {
        name: value
        for name, value in vars(asked).items()
        if name not in {"json", "rounds", "seconds", "base", "only"}
    }
    setting |= {
        "hidden": base.config.hidden_size,
        "intermediate": base.config.intermediate_size,
        "layers": base.config.num_hidden_layers,
    }
    if asked.json:
        body = {
            "setting": setting,
            "machine": timing.machine(asked.device),
            "rows": [asdict(row) for row in rows],
        }
        sys.stdout.write(json.dumps(body, indent=1) + "\n")
    else:
        text = ", ".join(f"{name} {value}" for name, value in setting.items())
        timing.tell(f"{text}\n\n{as_table(rows)}", asked.device)


if __name__ == "__main__":
    main()
