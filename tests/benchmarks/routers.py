"""Other routers on the same adapters, written from their papers.

    python -m tests.benchmarks.routers BASE TRAINED OUT.json [--rows 60] [--only NAME...]

BASE is a folder with SmolLM2-135M-Instruct as safetensors, TRAINED what `tests.benchmarks.bigbench`
left. Every figure goes into OUT.json when it is there, and is not made again.

One adapter for each prompt, chosen from what the base computes on it:

    retrieval     the one whose examples' mean embedding is nearest by cosine, as LoraRetriever
                  (arXiv 2402.09997) and LoRAuter (2601.21795) do for one adapter. They have
                  sentence encoders of their own; here an embedding is the mean of the base's last
                  hidden states over the question
    logo norm     the one whose update of the prompt's last token is the longest in the last block's
    logo entropy  query projection, or has the least entropy (LoGo, arXiv 2511.07129). LoGo then
                  merges the best few, which is not tried. It asks for adapters that all change that
                  projection: one that does not is judged by the mean over what it changes there

An adapter for each token:

    hidden gates  G is the mean input of each expert's examples (mergekit's `gate_mode: hidden`)
    phatgoose     each adapter learns a gate of its own; a token has the two largest (`phatgoose`)

Our own routers, Arrow and norms are a recipe's to compare.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from meteora.artifacts import RouterOptions
from meteora.base.chat_template import encode_prompt
from meteora.checkpoint.tensors import Gates
from meteora.fitting.layerwise import Sweep
from meteora.fitting.sequences import UNLABELLED, batched
from meteora.model.fused import force_expert, without_experts
from meteora.routing.gates import insert_gates
from meteora.routing.layer import routed_layers
from pipelines.scoring.intervals import wilson
from tests.benchmarks.bigbench import TRAININGS
from tests.benchmarks.gate_world import Results, World, timed
from tests.benchmarks.phatgoose import put_together
from tests.benchmarks.timing import machine, table
from tests.quickstart.make import TRAININGS as QUICKSTART

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

EXAMPLES = 64
NEEDS = {
    "oracle": "the right adapter",
    "retrieval": "examples",
    "logo norm": "nothing",
    "logo entropy": "nothing",
    "hidden gates": "examples",
    "phatgoose": "examples, each adapter its own",
}


class Signals(NamedTuple):
    """What the base computes on a prompt."""

    embedding: Tensor
    """[D] the mean of the last hidden states over the question."""
    lengths: Tensor
    """[E] of the last token's updates in the last block."""
    entropies: Tensor
    """[E]"""


@torch.inference_mode()
def signals(world: World, model: PreTrainedModel, prompt: str) -> Signals:
    """Read one prompt with the base."""
    ids, template = encode_prompt(world.tokenizer, prompt), world.template
    layers = routed_layers(model)
    last = max(int(path.split(".layers.")[1].split(".")[0]) for path in layers)
    block = {path: layer for path, layer in layers.items() if f".layers.{last}." in path}
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.projection.register_forward_hook(
            lambda _module, args, _out, path=path: inputs.update({path: args[0][0, -1]})
        )
        for path, layer in block.items()
    ]
    with without_experts(model):
        out = model(torch.tensor([ids]), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    question = slice(len(template.opening), len(ids) - len(template.closing))
    num_experts = len(world.names)
    found: list[dict[str, tuple[float, float]]] = [{} for _ in range(num_experts)]
    for path, layer in block.items():
        for e in range(num_experts):
            a, b = layer.stack.pair(e)
            if len(a):
                update = b @ (a @ inputs[path]) * layer.stack.scale(e)
                p = update.softmax(-1)
                entropy = -(p * p.clamp_min(1e-12).log()).sum()
                found[e][path.rpartition(".")[2]] = (update.norm().item(), entropy.item())
    pairs = [own.get("q_proj") or tuple(np.mean(list(own.values()), 0)) for own in found]
    lengths, entropies = torch.tensor(pairs).T
    return Signals(out.hidden_states[-1][0, question].mean(0), lengths, entropies)


def choices(world: World, name: str) -> dict[str, list[int]]:
    """The number of the adapter that each test row gets, by task."""
    model = world.model()
    read = partial(signals, world, model)
    asked = {task: [read(row.prompt) for row in rows] for task, rows in world.tests.items()}
    if name != "retrieval":
        sizes = {
            "logo norm": lambda seen: seen.lengths,
            "logo entropy": lambda seen: -seen.entropies,
        }[name]
        return {task: [int(sizes(one).argmax()) for one in rows] for task, rows in asked.items()}
    means = torch.stack(
        [
            torch.stack([read(row.prompt).embedding for row in rows[:EXAMPLES]]).mean(0)
            for rows in world.examples.values()
        ]
    )
    near = partial(torch.cosine_similarity, means)
    return {task: [int(near(one.embedding).argmax()) for one in r] for task, r in asked.items()}


def scores_of(world: World, chosen: dict[str, list[int]], results: Results) -> dict[str, list]:
    """Exact match of each row by the adapter that it got; each answer is asked for once."""
    model, kept = world.model(), world.tests
    found: dict[str, list] = {task: [0.0] * len(rows) for task, rows in kept.items()}
    for e, name in enumerate(world.names):
        with force_expert(model, name):
            for task, rows in kept.items():
                places = [i for i, choice in enumerate(chosen[task]) if choice == e]
                known = results.found.setdefault(f"answers {name} {task}", {"scores": {}})["scores"]
                new = [i for i in places if str(i) not in known]
                if new:
                    world.tests = {task: [rows[i] for i in new]}
                    values = world.scores(model, [task])[task]
                    known.update(zip(map(str, new), values, strict=True))
                    results.keep(f"answers {name} {task}", {"scores": known})
                for i in places:
                    found[task][i] = known[str(i)]
    world.tests = kept
    return found


def mean_inputs(world: World, model: PreTrainedModel) -> Gates:
    """Gates whose rows are the mean inputs of each expert's examples, and no offset."""
    sequences = world.sequences(EXAMPLES)
    batches = list(batched(sequences, set(), torch.device("cpu")))
    own: dict[str, tuple[Tensor, Tensor]] = {}
    follows: dict[str, str] = {}
    for layer in routed_layers(model).values():
        layer.router = None
    sweep = Sweep(model, [(b.input_ids, b.attention_mask) for b in batches])
    num_experts = len(world.names)
    for index in range(len(sweep.layers)):
        with sweep.held(index):
            for paths in sweep.points[index]:
                inputs = list(sweep.inputs(index, paths[0]))
                sums = torch.zeros(num_experts, inputs[0].shape[-1])
                counts = torch.zeros(num_experts)
                for x, batch in zip(inputs, batches, strict=True):
                    labels = batch.labels[batch.labels != UNLABELLED]
                    sums.index_add_(0, labels, x[batch.labels != UNLABELLED])
                    counts += torch.bincount(labels, minlength=num_experts)
                own[paths[0]] = sums / counts[:, None], torch.zeros(num_experts)
                follows |= dict.fromkeys(paths[1:], paths[0])
            sweep.advance(index)
    return Gates(own, follows)


def measure(world: World, name: str, results: Results) -> None:
    """Measure one router, if it is not there."""
    if name in results:
        return
    if name in ("hidden gates", "phatgoose"):
        model = world.model()
        with timed() as took:
            if name == "phatgoose":
                put_together(world, model, EXAMPLES)
            else:
                gates = mean_inputs(world, model)
                insert_gates(model, gates, RouterOptions("gate", 1, 1.0, share="point"))
        share, scores = world.routing(model)["after"], world.scores(model)
        results.keep(name, {"own tokens": share, "seconds": took["seconds"], "scores": scores})
        return
    with timed() as took:
        chosen = (
            {task: [e] * len(world.tests[task]) for e, task in enumerate(world.names)}
            if name == "oracle"
            else choices(world, name)
        )
    own = [choice == world.names.index(task) for task, row in chosen.items() for choice in row]
    scores = scores_of(world, chosen, results)
    share = float(np.mean(own))
    results.keep(name, {"own prompts": share, "seconds": took["seconds"], "scores": scores})


def show(world: World, names: Sequence[str], results: Results) -> None:
    rows = []

    def values(name: str) -> list[float]:
        return [value for task in world.names for value in results[name]["scores"][task]]

    for name in names:
        found, flat = results[name], values(name)
        low, high = wilson(int(sum(flat)), len(flat))
        right = values("oracle") if "oracle" in results else flat
        others = [a != b for a, b in zip(flat, right, strict=True)]
        rows.append(
            [
                name,
                NEEDS[name],
                f"{found['own prompts']:.3f}" if "own prompts" in found else "",
                f"{found['own tokens']:.3f}" if "own tokens" in found else "",
                f"{np.mean(flat):.3f} [{low:.3f}, {high:.3f}]",
                f"{sum(others)}" if "oracle" in results else "",
            ]
        )
    heads = ["router", "needs", "own prompts", "own tokens", "score", "rows unlike the oracle's"]
    print(f"{machine()}; {EXAMPLES} examples an expert, {len(flat)} rows\n")
    print(table(heads, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--only", nargs="+", choices=NEEDS, default=list(NEEDS))
    args = parser.parse_args()
    world = World.open(args.base, args.trained, [*TRAININGS, *QUICKSTART], args.rows)
    results = Results(args.out)
    for name in args.only:
        measure(world, name, results)
    show(world, [name for name in NEEDS if name in results], results)


if __name__ == "__main__":
    main()
