"""What gates cost and what they are worth.

    python -m tests.benchmarks.gates BASE TRAINED OUT.json

BASE is a folder with SmolLM2-135M-Instruct as safetensors, TRAINED what `tests.benchmarks.bigbench`
left. Every fit goes into OUT.json as it is done, and is not done again; the tables are printed at
the end. Seconds are of processor time, with one thread.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from meteora.artifacts import NULL, JointSettings, RouterOptions
from meteora.artifacts.routers import POINT_GATES
from meteora.base.chat_template import encode_prompt
from meteora.fitting.add_expert import grow
from meteora.fitting.calibrate import calibrate
from meteora.fitting.joint import train_jointly
from meteora.model.fused import expert_names, force_expert, without_experts
from meteora.model.fused import make_router as untrained
from meteora.model.generate import answer_all
from meteora.routing.gates import gates_of
from meteora.routing.hooks import recorded_logits
from meteora.routing.layer import routed_by
from pipelines.data.background import background_rows
from pipelines.data.composites import answer_openings, compose, encode_composite
from pipelines.data.labels import background_sequences, label_composites
from tests.benchmarks.gate_tables import print_tables
from tests.benchmarks.gate_world import MOST_EXAMPLES, Results, World, timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

EXPERTS = (
    "reverse_words", "arithmetic", "iso_dates", "spelled_numbers", "sort_numbers", "order_lines",
    "valid_parentheses", "unit_addition",
)  # fmt: skip
COUNTS = (8, 16, 32, 64, MOST_EXAMPLES)
USUAL = 32
"""Examples an expert of every comparison but the first."""
TAUGHT = 16
"""Examples an expert where joint training is compared: ten times a sweep's time has to end."""
JOINT = JointSettings(
    steps=1, batch_size=8, accumulate=1, learning_rate=5e-3, warmup_ratio=0.05,
    gate_loss_weight=50.0, max_grad_norm=0.3, start="zeros",
)  # fmt: skip
WARM_RATE = 5e-4
"""Learning rate behind a sweep: what is fitted is not to be lost in the first steps."""
MARGIN = 2.0
"""Of the second expert's logit behind the first one's, in the comparison of adaptive k."""


def judged(world: World, model: PreTrainedModel, found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "routing": world.routing(model), "scores": world.scores(model)}


def fitted(
    world: World, count: int = USUAL, **asked: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model whose gates are calibrated on the first `count` examples of each expert."""
    model = world.model()
    asked = {"template": world.template, **asked}
    with timed() as clock:
        made = calibrate(model, world.sequences(count), **asked)
    return model, {"seconds": clock["seconds"], "tokens": made.num_tokens, "examples": count}


def oracle(world: World, results: Results) -> None:
    model = world.model()
    scores: dict[str, list[float]] = {}
    for name in world.names:
        with force_expert(model, name):
            scores |= world.scores(model, [name])
    results.keep("oracle", {"scores": scores})
    for kind in ("uniform", "arrow", "norm"):
        if kind not in results:
            with routed_by(
                model, lambda layer, kind=kind: untrained(RouterOptions(kind, 1, 1.0), layer)
            ):
                results.keep(kind, judged(world, model, {}))


def counts(world: World, results: Results) -> None:
    for count in COUNTS:
        if (key := f"calibrate {count}") not in results:
            results.keep(key, judged(world, *fitted(world, count)))


def joint(world: World, results: Results) -> None:
    """The paper's way, as long as the sweep takes and ten times as long."""
    wanted = results[f"calibrate {TAUGHT}"]["seconds"]
    missing = [times for times in (1, 10) if f"joint x{times}" not in results]
    rest, a_step = joint_costs(world) if missing else (0.0, 1.0)
    for times in missing:
        steps = max(1, round((times * wanted - rest) / a_step))
        results.keep(f"joint x{times}", jointly(world, replaced(JOINT, steps=steps)))
    if (key := "joint x1 behind it") not in results:
        settings = replaced(
            JOINT, steps=results["joint x1"]["steps"], start="calibrate", learning_rate=WARM_RATE
        )
        swept = results[f"calibrate {TAUGHT}"]["tokens"]
        results.keep(key, jointly(world, settings, tokens_before=swept))


def jointly(world: World, settings: JointSettings, tokens_before: int = 0) -> dict[str, Any]:
    """What training by these settings costs and comes to."""
    model, sequences = world.model(), world.sequences(TAUGHT)
    with timed() as clock:
        train_jointly(model, sequences, settings, template=world.template)
    a_sequence = sum(len(s.input_ids) for s in sequences) / len(sequences)
    done = {
        "seconds": clock["seconds"],
        "steps": settings.steps,
        "tokens": tokens_before + round(settings.steps * settings.batch_size * a_sequence),
        "examples": TAUGHT,
    }
    return judged(world, model, done)


def joint_costs(world: World, steps: int = 16) -> tuple[float, float]:
    """Seconds of what joint training does beside its steps, and of one of these."""
    at: list[float] = []
    with timed() as clock:
        train_jointly(
            world.model(),
            world.sequences(TAUGHT),
            replaced(JOINT, steps=steps),
            template=world.template,
            progress=lambda _done, _total: at.append(time.process_time()),
        )
    a_step = (at[-1] - at[0]) / (steps - 1)
    return clock["seconds"] - steps * a_step, a_step


def replaced(settings: JointSettings, **changed: Any) -> JointSettings:
    return JointSettings.from_dict({**settings.to_dict(), **changed})


def choices(world: World, results: Results) -> None:
    """How many experts a token gets, and how far one gate decides."""
    asked: dict[str, dict[str, Any]] = {
        "top-2": {"top_k": 2},
        f"top-2, margin {MARGIN}": {"top_k": 2, "margin": MARGIN},
        "share module": {"share": "module"},
        "share layer": {"share": "layer"},
        "share token": {"share": "token"},
        f"share layer, {TAUGHT} examples": {"share": "layer"},
    }
    for key, changed in asked.items():
        if key in results:
            continue
        count = TAUGHT if "examples" in key else USUAL
        model, found = fitted(world, count, options=replace(POINT_GATES, **changed))
        results.keep(key, judged(world, model, found | {"speed": speed(model)}))


def speed(model: PreTrainedModel, rounds: int = 15) -> dict[str, float]:
    """Median ratio of the routed model's time to the base's, in turns."""
    prompt, one = torch.randint(0, 40_000, (1, 256)), torch.randint(0, 40_000, (1, 1))

    def prefill() -> None:
        model(input_ids=prompt, logits_to_keep=1, use_cache=False)

    def decode() -> None:
        for _ in range(8):
            model(input_ids=one, use_cache=False)

    return {"prefill": _ratio(model, prefill, rounds), "decode": _ratio(model, decode, rounds)}


def _ratio(model: PreTrainedModel, run: Callable[[], None], rounds: int) -> float:
    ratios = []
    with torch.inference_mode():
        for _ in range(rounds):
            with without_experts(model), timed() as bare:
                run()
            with timed() as routed:
                run()
            ratios.append(routed["seconds"] / bare["seconds"])
    return sorted(ratios)[rounds // 2]


def null(world: World, results: Results) -> None:
    """The base as one of the choices: what it keeps of the base, and whether it is found."""
    if "null" in results:
        return
    rows = background_rows()
    held_out = rows[::4]
    model = world.model(null=True)
    place = len(world.names)
    sequences = world.sequences(USUAL) + background_sequences(
        model, world.tokenizer, [row for row in rows if row not in held_out], place
    )
    with timed() as clock:
        calibrate(model, sequences, template=world.template)
    asked = [encode_prompt(world.tokenizer, row.prompt) for row in held_out if row.prompt]
    with without_experts(model):
        said = answer_all(model, world.tokenizer, asked, 48)
    texts = [[*ids, *more] for ids, more in zip(asked, said, strict=True)]
    texts += [world.tokenizer(row.response).input_ids for row in held_out if not row.prompt]
    own = [
        ids + world.tokenizer(row.response, add_special_tokens=False).input_ids
        for name in world.names
        for row in world.tests[name][:20]
        for ids in [encode_prompt(world.tokenizer, row.prompt)]
    ]
    fused = sum(_loss(model, ids) for ids in texts)
    with without_experts(model):
        bare = sum(_loss(model, ids) for ids in texts)
    num_tokens = sum(len(ids) - 1 for ids in texts)
    outside, inside = ([_base_share(model, ids) for ids in some] for some in (texts, own))
    wins = sum((a > b) + 0.5 * (a == b) for a in outside for b in inside)
    results.keep(
        "null",
        judged(
            world,
            model,
            {
                "seconds": clock["seconds"],
                "texts": len(texts),
                "perplexity ratio": float(torch.tensor((fused - bare) / num_tokens).exp()),
                "auroc": wins / len(outside) / len(inside),
                "base share outside": sum(outside) / len(outside),
                "base share inside": sum(inside) / len(inside),
            },
        ),
    )


def _loss(model: PreTrainedModel, ids: list[int]) -> float:
    """Summed over the tokens, in nats."""
    tensor = torch.tensor([ids])
    with torch.inference_mode():
        return float(model(input_ids=tensor, labels=tensor).loss) * (len(ids) - 1)


def _base_share(model: PreTrainedModel, ids: list[int]) -> float:
    """The mean probability, over modules and tokens, that the base is the one to take it."""
    place = expert_names(model).index(NULL)
    with torch.inference_mode(), recorded_logits(model) as logits:
        model(input_ids=torch.tensor([ids]), logits_to_keep=1)
    return float(
        torch.stack([one.float().softmax(-1)[:, place].mean() for one in logits.values()]).mean()
    )


def growth(world: World, results: Results) -> None:
    """All experts but one fitted together, the last one added from what was kept."""
    if "grown" in results:
        return
    *old, new = world.names
    before = world.model(old)
    with timed() as clock:
        made = calibrate(before, world.sequences(USUAL, old), template=world.template)
    results.keep("before growth", {
        "seconds": clock["seconds"],
        "routing": world.routing(before, old),
        "scores": world.scores(before, old),
    })  # fmt: skip
    model = world.model()
    entry = RouterOptions("gate", 1, 1.0, opening="prompt", share="point")
    with timed() as clock:
        grow(model, world.sequences(USUAL, [new]), gates_of(before), made.statistics, entry)
    results.keep("grown", judged(world, model, {"seconds": clock["seconds"]}))


def spans(world: World, results: Results) -> None:
    """Several tasks in one prompt: gates that saw such prompts, and gates that did not."""
    tests = {name: world.tests[name] for name in world.names}
    for key, kinds in {"single tasks": [], "with composites": [(3, 0), (5, 0)]}.items():
        if key in results:
            continue
        model = world.model()
        sequences = world.sequences(USUAL) + label_composites(
            {name: world.examples[name][:USUAL] for name in world.names},
            world.names, world.tokenizer, kinds=kinds, seed=0,
        )  # fmt: skip
        calibrate(model, sequences, template=world.template)
        found = {f"n={n}": _followed(world, model, tests, n) for n in (3, 5, 10)}
        results.keep(key, judged(world, model, found))


def _followed(world: World, model: PreTrainedModel, tests: Any, n: int) -> dict[str, float]:
    """Routing accuracy in prompts of n tasks, of all tokens and of the numbers that answers begin
    with, and tokens until routing follows a change."""
    names = expert_names(model)
    right, opened, delays = [], [], []
    for composite in compose(tests, n, 16, 0):
        ids, owners = encode_composite(world.tokenizer, composite)
        with torch.inference_mode(), recorded_logits(model) as logits:
            model(input_ids=torch.tensor([ids]), logits_to_keep=1)
        chosen = torch.stack([one.argmax(-1) for one in logits.values()])
        votes = torch.nn.functional.one_hot(chosen, len(names)).sum(0).argmax(-1).tolist()
        openings = answer_openings(world.tokenizer, composite)
        opened += [votes[t] == names.index(str(owners[t])) for t in openings]
        previous, start = None, 0
        for t, owner in enumerate(owners):
            if owner != previous:
                previous, start, found = owner, t, False
            if owner is not None:
                right.append(votes[t] == names.index(owner))
                if right[-1] and not found:
                    delays.append(t - start)
                    found = True
    return {
        "accuracy": sum(right) / len(right),
        "openings": sum(opened) / len(opened),
        "tokens to switch": sum(delays) / len(delays),
    }


SECTIONS = {
    "oracle": oracle, "counts": counts, "joint": joint, "choices": choices, "null": null,
    "growth": growth, "spans": spans,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", nargs="*", default=list(EXPERTS))
    parser.add_argument("--rows", type=int, default=40, help="test rows a task")
    parser.add_argument("--only", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(asked.out)
    world = World.open(asked.base, asked.trained, asked.experts, asked.rows)
    for name in asked.only:
        if name != "oracle" or "norm" not in results:
            SECTIONS[name](world, results)
    print_tables(results.found)


if __name__ == "__main__":
    main()
