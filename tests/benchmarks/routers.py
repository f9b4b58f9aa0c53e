"""Other routers on the same adapters, written from their papers.

    python -m tests.benchmarks.routers BASE TRAINED OUT.json [--rows 60] [--only NAME...]
                                       [--ours NAME=CHECKPOINT...]

BASE is a folder with SmolLM2-135M-Instruct as safetensors, TRAINED what `tests.benchmarks.bigbench`
left, and a CHECKPOINT what `meteora run` made of the same adapters. Every figure goes into OUT.json
when it is there, and is not made again.

One adapter for each prompt, or several by shares, chosen from what the base computes on it:

    retrieval     by the cosine between the prompt's embedding and the mean of an adapter's
                  examples: the best; the mean of the best three, as LoraRetriever does (arXiv
                  2402.09997); or those three by the softmax of their cosines, as LoRAuter does
                  (2601.21795). They have sentence encoders of their own; here an embedding is the
                  mean of the base's last hidden states over the question. Cosines of these differ
                  less, and a softmax at 0.2 (LoRAuter's temperature is a guess) is nearly the
                  mean; so a sharp one is tried, too
    logo norm     by the length of the update of the prompt's last token in the last block's query
    logo entropy  projection, or by the inverse of its entropy (LoGo, 2511.07129): the best, or the
                  best three in proportion. LoGo asks for adapters that all change that projection:
                  one that does not is judged by the mean over what it changes there. LoGo reads the
                  prompt with all adapters on; here the base alone reads it

An adapter for each token:

    hidden gates  G is the mean input of each expert's examples (mergekit's `gate_mode: hidden`)
    phatgoose     each adapter learns a gate of its own; a token has the two largest (`phatgoose`)
    spectr        the adapter whose directions of input make the token longest; or four (`spectr`)
    arrow, norm   the package's own `kind: arrow` (2405.11157) and `norm` (2509.18093)
"""

from __future__ import annotations

import argparse
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

import meteora
from meteora.artifacts import RouterOptions
from meteora.base.chat_template import encode_prompt
from meteora.checkpoint.tensors import Gates
from meteora.fitting.layerwise import Sweep
from meteora.fitting.sequences import UNLABELLED, batched
from meteora.model.fused import make_router, without_experts
from meteora.routing.gates import insert_gates
from meteora.routing.layer import routed_layers
from pipelines.scoring.intervals import wilson
from tests.benchmarks.bigbench import TRAININGS
from tests.benchmarks.gate_world import Results, World, timed
from tests.benchmarks.mixtures import answer_all_mixed, equal, in_proportion, shares_of, softmax
from tests.benchmarks.paired import difference
from tests.benchmarks.phatgoose import put_together
from tests.benchmarks.spectr import SpectR
from tests.benchmarks.timing import machine, table
from tests.quickstart.make import TRAININGS as QUICKSTART

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

EXAMPLES = 64
MERGED = 3
"""Adapters for one prompt, where there are several."""
SPECTR_TOP_K = {"spectr": 1, "spectr, 4": 4}
DEFAULT = "default"
BY_PROMPT = {
    "oracle": ("oracle", 1, equal),
    "retrieval": ("cosine", 1, equal),
    "retrieval, mean of 3": ("cosine", MERGED, equal),
    "retrieval, softmax of 3": ("cosine", MERGED, partial(softmax, temperature=0.2)),
    "retrieval, sharp softmax of 3": ("cosine", MERGED, partial(softmax, temperature=0.01)),
    "logo norm": ("norm", 1, equal),
    "logo norm, 3": ("norm", MERGED, in_proportion),
    "logo entropy": ("entropy", 1, equal),
    "logo entropy, 3": ("entropy", MERGED, in_proportion),
}
"""What the adapters are scored by, how many a prompt has, and their shares."""
BY_TOKEN = ["arrow", "norm", *SPECTR_TOP_K, "hidden gates", "phatgoose"]


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


def scores_by_prompt(world: World) -> dict[str, dict[str, Tensor]]:
    """The adapters' scores [N, E] for the N test rows of each task, by what they are scored by."""
    model = world.model()
    read = partial(signals, world, model)
    means = torch.stack(
        [
            torch.stack([read(row.prompt).embedding for row in rows[:EXAMPLES]]).mean(0)
            for rows in world.examples.values()
        ]
    )
    found: dict[str, dict[str, Tensor]] = {"oracle": {}, "cosine": {}, "norm": {}, "entropy": {}}
    for own, (task, rows) in zip(torch.eye(len(means)), world.tests.items(), strict=True):
        embeddings, lengths, entropies = map(
            torch.stack, zip(*(read(row.prompt) for row in rows), strict=True)
        )
        found["oracle"][task] = own.expand(len(rows), -1)
        found["cosine"][task] = torch.cosine_similarity(embeddings[:, None], means, dim=-1)
        found["norm"][task] = lengths
        found["entropy"][task] = 1 / (entropies + 1e-6)
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

    def take_means(index: int, paths: Sequence[str]) -> None:
        inputs = list(sweep.inputs(index, paths[0]))
        sums = torch.zeros(num_experts, inputs[0].shape[-1])
        counts = torch.zeros(num_experts)
        for x, batch in zip(inputs, batches, strict=True):
            labels = batch.labels[batch.labels != UNLABELLED]
            sums.index_add_(0, labels, x[batch.labels != UNLABELLED])
            counts += torch.bincount(labels, minlength=num_experts)
        own[paths[0]] = sums / counts[:, None], torch.zeros(num_experts)
        follows.update(dict.fromkeys(paths[1:], paths[0]))

    sweep.run(take_means, lambda _done, _total: None)
    return Gates(own, follows)


def route_by_token(world: World, model: PreTrainedModel, name: str) -> None:
    """Give a model the router of this name, one of `BY_TOKEN`."""
    if name == "phatgoose":
        put_together(world, model, EXAMPLES)
    elif name == "hidden gates":
        insert_gates(model, mean_inputs(world, model), RouterOptions("gate", 1, 1.0, share="point"))
    else:
        for layer in routed_layers(model).values():
            if name in SPECTR_TOP_K:
                options = RouterOptions("norm", SPECTR_TOP_K[name], 1.0)
                layer.router = SpectR(layer.stack, options)
            else:
                layer.router = make_router(RouterOptions(name, 1, 1.0), layer)


def measure(
    world: World, name: str, results: Results, scores: Callable[[], dict[str, dict[str, Tensor]]]
) -> None:
    """Measure one router, if it is not there."""
    if name in results:
        return
    model = world.model()
    if name in BY_TOKEN:
        with timed() as took:
            route_by_token(world, model, name)
        keep_routed(world, name, model, results, took["seconds"])
        return
    kind, k, weigh = BY_PROMPT[name]
    own, values = [], {}
    for place, (task, judged) in enumerate(scores()[kind].items()):
        own.append((judged.argmax(-1) == place).float())
        answer = partial(answer_all_mixed, shares=shares_of(judged, k, weigh))
        values |= world.scores(model, [task], answer)
    results.keep(name, {"own prompts": torch.cat(own).mean().item(), "scores": values})


def keep_routed(
    world: World, name: str, model: PreTrainedModel, results: Results, seconds: float | None = None
) -> None:
    """Keep what a model with routers of its own scores."""
    share, scores = world.routing(model)["after"], world.scores(model)
    results.keep(name, {"own tokens": share, "seconds": seconds, "scores": scores})


def show(world: World, names: Sequence[str], results: Results) -> None:
    rows = []
    for name in names:
        found = results[name]
        values = {task: found["scores"][task] for task in world.names}
        flat = [value for own in values.values() for value in own]
        low, high = wilson(sum(flat), len(flat))
        default = results[DEFAULT]["scores"] if DEFAULT in results else values
        pairs = [(values[task], default[task]) for task in world.names]
        rows.append(
            [
                name,
                f"{found['own prompts']:.3f}" if "own prompts" in found else "",
                f"{found['own tokens']:.3f}" if "own tokens" in found else "",
                f"{np.mean(flat):.3f} [{low:.3f}, {high:.3f}]",
                "" if default is found["scores"] else difference(pairs),
            ]
        )
    heads = ["router", "own prompts", "own tokens", "score", f"less the {DEFAULT}'s"]
    print(f"{machine()}; {EXAMPLES} examples an expert, {len(flat)} rows\n")
    print(table(heads, rows))


def named_checkpoint(text: str) -> tuple[str, Path]:
    name, _, folder = text.rpartition("=")
    return name, Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--only", nargs="*", choices=[*BY_PROMPT, *BY_TOKEN])
    parser.add_argument("--ours", nargs="+", default=[], type=named_checkpoint)
    args = parser.parse_args()
    world = World.open(args.base, args.trained, [*TRAININGS, *QUICKSTART], args.rows)
    results = Results(args.out)
    for name, checkpoint in args.ours:
        if name not in results:
            model, _ = meteora.load(checkpoint, base_folder=args.base)
            keep_routed(world, name, model, results)
    scores = cache(partial(scores_by_prompt, world))
    for name in [*BY_PROMPT, *BY_TOKEN] if args.only is None else args.only:
        measure(world, name, results, scores)
    show(world, list(results.found), results)


if __name__ == "__main__":
    main()
