"""What the routers of `tests.benchmarks.routers` cost: to fit, to read a prompt, to decode.

    python -m tests.benchmarks.router_costs BASE FOLDER OUT.json [--only NAME...]

BASE is a folder with SmolLM2-135M-Instruct as safetensors, FOLDER one for files that are written
meanwhile. The experts are the quickstart's six, with 64 examples each for routers that need them.
One thread, in seconds of processor time. The prompt has 128 tokens and is alone in its batch; the
times to read it and to decode 32 tokens are relative to the base's, the best of some rounds that
both take in turns. Retrieval, its mean of three adapters, and LoGo choose for a prompt that the
base has read; one function computes what they need.
Every figure goes into OUT.json when it is there, and is not made again.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meteora.artifacts import RouterOptions
from meteora.fitting.background import fit_to_background
from meteora.model.fused import without_experts
from meteora.routing.layer import routed_by, routed_layers
from meteora.routing.routers import Fixed
from pipelines.data.labels import background_ids
from tests.benchmarks.gate_world import Results, World, timed
from tests.benchmarks.phatgoose import AllGates
from tests.benchmarks.prompts import fitted
from tests.benchmarks.routers import BY_TOKEN, EXAMPLES, MERGED, route_by_token, signals
from tests.benchmarks.timing import best_of, machine, table
from tests.quickstart.make import TRAININGS as QUICKSTART

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

ROUTERS = [
    "oracle", "default", "share: turn", "kind: prompt", "hidden gates", "phatgoose", "retrieval",
    "logo", "mean of 3", "norm", "spectr", "spectr, 4",
]  # fmt: skip
BY_THE_BASE = {"retrieval", "logo", "mean of 3"}
CHOSEN = {"oracle": 1, "retrieval": 1, "logo": 1, "mean of 3": MERGED}
"""How many adapters have shares of a whole prompt."""
PROMPT, NEW, ROUNDS = 128, 32, 8


def fit(world: World, name: str) -> PreTrainedModel:
    """A model with this router, as its examples or texts make it."""
    if name in ("default", "share: turn"):
        return fitted(world, "shared" if name == "default" else "turn")
    model = world.model()
    if name == "kind: prompt":
        options, texts = RouterOptions("prompt", 1, 1.0), background_ids(world.tokenizer)
        fit_to_background(model, texts, options, world.template)
    elif name in BY_TOKEN and name != "phatgoose":
        route_by_token(world, model, name)
    elif name == "phatgoose":  # whatever they are: learning them is timed elsewhere
        for layer in routed_layers(model).values():
            num_inputs = layer.stack.a.shape[1]
            layer.router = AllGates(torch.randn(len(world.names), num_inputs))
    elif name in ("retrieval", "mean of 3"):
        for rows in world.examples.values():
            for row in rows[:EXAMPLES]:
                signals(world, model, row.prompt)
    return model


def cost(world: World, name: str) -> dict[str, float]:
    """Seconds to fit, and the times to read and to decode, relative to the base."""
    with timed() as took:
        model = fit(world, name)
    shares = torch.zeros(len(world.names))
    shares[: CHOSEN.get(name)] = 1 / CHOSEN.get(name, 1)
    template, generator = world.template, torch.Generator().manual_seed(0)
    num_own = PROMPT - len(template.opening) - len(template.closing)
    drawn = torch.randint(1000, 40_000, (num_own,), generator=generator).tolist()
    ids = torch.tensor([[*template.opening, *drawn, *template.closing]])
    question = str(world.tokenizer.decode(drawn))

    def read() -> object:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def routed(run: Callable[[], object]) -> Callable[[], object]:
        def choose_and_run() -> object:
            with ExitStack() as stack:
                if name in BY_THE_BASE:
                    signals(world, model, question)
                if name in CHOSEN:
                    stack.enter_context(routed_by(model, lambda _: Fixed(shares)))
                return run()

        return choose_and_run

    def on_base(run: Callable[[], object]) -> Callable[[], object]:
        def without() -> object:
            with without_experts(model):
                return run()

        return without

    def read_and_decode() -> object:
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token: Tensor = ids[:, -1:]
        for _ in range(NEW):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        return out

    runs = {"read": read, "all": read_and_decode}
    times = best_of(
        {f"base {key}": on_base(run) for key, run in runs.items()}
        | {key: routed(run) for key, run in runs.items()},
        ROUNDS,
    )
    return {
        "fit": took["seconds"],
        "read": times["read"] / times["base read"],
        "decode": (times["all"] - times["read"]) / (times["base all"] - times["base read"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    world = World.open(args.base, args.folder, list(QUICKSTART), num_tests=1)
    results = Results(args.out)
    for name in args.only:
        if name not in results:
            results.keep(name, cost(world, name))
    rows = []
    for name in ROUTERS:
        if name in results:
            seconds, read, decode = (results[name][key] for key in ("fit", "read", "decode"))
            rows.append([name, f"{seconds:.0f}", f"{read:.2f}", f"{decode:.2f}"])
    print(f"{machine()}\n")
    print(table(["router", "fit, s", "read", "decode"], rows))


if __name__ == "__main__":
    main()
