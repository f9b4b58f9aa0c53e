"""Take the labels off a recipe's examples, and see who gets which prompt.

    python -m tests.benchmarks.pool make RECIPE OUT [--nobodys ROWS.jsonl ...] [--each 48] [--null]
                                                    [--experts 7] [--stand-in arrow]
    meteora run OUT/recipe.yaml --home HOME
    python -m tests.benchmarks.pool judge RECIPE OUT HOME
    python -m tests.benchmarks.pool limits RECIPE OUT CHECKPOINT BASE
    python -m tests.benchmarks.pool beside OUT HOME CHECKPOINT HOME LABELS
    python -m tests.benchmarks.pool draws RECIPE CHECKPOINT BASE [--beside 64 32 0]

`make` writes a recipe without examples, and a pool of their prompts in a random order; with
`--nobodys` also the first prompts of files that belong to no expert. With `--experts` only so many
experts lose their examples, drawn from the recipe's; with `--stand-in` there is no pool for these,
and they are routed by their weights. `judge` compares what each expert was dealt with whose the
prompts are, and its own answers with the right ones. `limits` prints how far the clusters of a pool
are from the limits below which they belong to no expert, and how many prompts get the same owner in
another order. `beside` compares a checkpoint that OUT's recipe made in a home with one of another
home, whose gates were fitted to labelled examples, on the rows that both were asked; each is named
by the first characters of its id. `draws` reads the prompts of all experts of a recipe once, and
deals those of a few, drawn 20 times, beside so many examples of each other one. Both it and
`limits` take a CHECKPOINT with the recipe's experts.
"""

import argparse
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

import meteora
from meteora.base.chat_template import encode_prompt
from meteora.model.update_sizes import read_prompts
from pipelines.data import pool as dealing
from pipelines.data.claims import Claim, read_claims
from pipelines.data.row_sources import read_rows
from pipelines.data.rows import Row
from pipelines.recipe.recipe import locate
from pipelines.scoring.compare import recorded_scores
from pipelines.scoring.outputs import read_outputs
from store.ledger import Ledger
from tests.benchmarks.paired import Pair, difference, mean_score
from tests.benchmarks.timing import table

NUM_DRAWS = 20
SYSTEMS = ["oracle"]


def examples_in(recipe: Path) -> dict[str, list[Row]]:
    """The examples of a recipe, by expert, as its gates would be fitted to them."""
    body = yaml.safe_load(recipe.read_text())
    limit = body.get("gates", {}).get("examples_per_expert", 64)
    return {e["name"]: read_rows(e["examples"], recipe.parent, limit) for e in body["experts"]}


def make(
    recipe: Path,
    out: Path,
    nobodys: list[Path],
    each: int,
    experts: int | None,
    stand_in: str,
    *,
    null: bool,
) -> None:
    """Write OUT/recipe.yaml and OUT/pool.jsonl."""
    body = yaml.safe_load(recipe.read_text())
    examples = examples_in(recipe)
    drawn = random.Random(0).sample(list(examples), len(examples))[:experts]
    prompts = [row.prompt for name, rows in examples.items() if name in drawn for row in rows]
    for path in nobodys:
        rows = read_rows(f"jsonl:{path.absolute()}", path.parent, each, answered=False)
        prompts += [row.prompt for row in rows]
    random.Random(0).shuffle(prompts)
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (out / "pool.jsonl").write_text("".join(lines))
    for expert in body["experts"]:
        if expert["name"] in drawn:
            del expert["examples"]
        for key in {"adapter", "examples", "test"} & expert.keys():
            kind, _, path = expert[key].partition(":")
            expert[key] = f"{kind}:{(recipe.parent / path).absolute()}"
    if stand_in:
        body.setdefault("router", {})["without_examples"] = stand_in
    else:
        body.setdefault("gates", {})["pool"] = "jsonl:pool.jsonl"
    if null:
        body.setdefault("router", {})["null"] = True
    body["benchmark"]["compare"] = SYSTEMS
    (out / "recipe.yaml").write_text(yaml.safe_dump(body, sort_keys=False))


def judge(recipe: Path, out: Path, home: Path) -> None:
    """Print how the pool of OUT was dealt in HOME."""
    examples = examples_in(recipe)
    owner = {row.sha256: name for name, rows in examples.items() for row in rows}
    right = {row.sha256: row.answers for rows in examples.values() for row in rows}
    claims = _claims(out / "pool.jsonl", home)
    counts = Counter((owner.get(Row(c.prompt, "").sha256, ""), c.expert) for c in claims)
    answered = [c for c in claims if c.response is not None]
    rows = []
    for name in (*examples, ""):
        own = sum(n for (whose, _), n in counts.items() if whose == name)
        others = sum(n for (whose, to), n in counts.items() if whose and whose != name == to)
        nobodys = counts[("", name)] if name else 0
        said = [c for c in answered if c.expert == name == owner.get(Row(c.prompt, "").sha256)]
        good = sum(c.response in right[Row(c.prompt, "").sha256] for c in said)
        rows.append(
            [
                name or "no expert",
                own,
                counts[(name, name)],
                others,
                nobodys,
                f"{good} of {len(said)}",
            ]
        )
    heads = ["owner", "prompts", "dealt correctly", "others'", "foreign", "own answers right"]
    print(table(heads, rows))
    agreed = sum(n for (whose, to), n in counts.items() if whose == to)
    print(f"\n{agreed} of {len(claims)} prompts were dealt correctly")


def limits(recipe: Path, out: Path, checkpoint: Path, base: Path) -> None:
    """Print the scores of the clusters of OUT's pool, and what another order of it changes."""
    names = [*examples_in(recipe)]
    lines = (out / "pool.jsonl").read_text().splitlines()
    prompts = [*dict.fromkeys(str(json.loads(line)["prompt"]) for line in lines)]
    points, sizes = _read(prompts, checkpoint, base, len(names))
    clusters = dealing.clusters_of(points, dealing.CLUSTERS_PER_EXPERT * len(names))
    scores = dealing.stand_out(sizes, clusters)
    best, whose = scores.max(1), scores.argmax(1)
    shares = best / scores.max(0)[whose]
    owned = (best >= dealing.LEAST_SCORE) & (shares >= dealing.LEAST_SHARE)
    print(f"{owned.sum()} clusters of an expert, {(~owned).sum()} others")
    print(f"of an expert: {best[owned].min():.2f} and {shares[owned].min():.2f} at least")
    if not owned.all():
        print(f"the others: {best[~owned].max():.2f} and {shares[~owned].max():.2f} at most")
    order = np.random.default_rng(1).permutation(len(prompts))
    every = np.concatenate([order, np.arange(len(prompts), len(sizes))])
    claims = dealing.claims_of(prompts, points, sizes, names)
    others = dealing.claims_of([prompts[i] for i in order], points[order], sizes[every], names)
    same = sum(claims[i].expert == one.expert for i, one in zip(order, others, strict=True))
    print(f"in another order {same} of {len(prompts)} prompts have the same owner")


def beside(out: Path, home: Path, checkpoint: str, labels_home: Path, labels: str) -> None:
    """Print the scores of two checkpoints on the same rows, and their differences."""
    body = yaml.safe_load((out / "recipe.yaml").read_text())
    without = [expert["name"] for expert in body["experts"] if "examples" not in expert]
    ours, others = _values(home, checkpoint), _values(labels_home, labels)
    pairs: dict[str, Pair] = {}
    for task in ours:
        both = [asked for asked in ours[task] if asked in others.get(task, {})]
        if both:
            pairs[task] = [ours[task][one] for one in both], [others[task][one] for one in both]
    means = {
        "mean of those without examples": [pairs[task] for task in pairs if task in without],
        "mean of the others": [
            pairs[one["name"]] for one in body["experts"] if one["name"] not in without
        ],
    }
    rows = []
    for name, chosen in [*((task, [pair]) for task, pair in pairs.items()), *means.items()]:
        if chosen:
            our, their = (mean_score(values) for values in zip(*chosen, strict=True))
            n = sum(len(values) for values, _ in chosen)
            share = f"{our / their:.3f}" if their else ""
            rows.append([name, n, f"{their:.3f}", f"{our:.3f}", share, difference(chosen)])
    print(table(["task", "n", "labels", "this", "share", "difference"], rows))


def _values(home: Path, checkpoint: str) -> dict[str, dict[str, float]]:
    """The value of each row that a checkpoint was asked, by task and by what it was asked."""
    ledger = Ledger(home)
    ledger.ingest()
    subjects = ledger.query("SELECT DISTINCT subject_id FROM scores").rows
    values: dict[str, dict[str, float]] = {}
    for router in (one for (one,) in subjects if one.startswith(f"router:{checkpoint}")):
        for score in recorded_scores(ledger, router):
            rows = read_outputs(ledger.blobs.path_of(score.outputs_sha256))
            own = {str(row["asked"]): float(row[score.spec.metric]) for row in rows}
            values.setdefault(score.spec.task, {}).update(own)
    return values


def draws(recipe: Path, checkpoint: Path, base: Path, beside: list[int]) -> None:
    """Print the share of prompts that go to their owner, by the number of experts without any."""
    examples = examples_in(recipe)
    names = [*examples]
    prompts = [row.prompt for rows in examples.values() for row in rows]
    owner = np.repeat(names, [len(rows) for rows in examples.values()])
    place = np.concatenate([np.arange(len(rows)) for rows in examples.values()])
    points, sizes = _read(prompts, checkpoint, base, len(names))

    def share(without: Sequence[str], each: int) -> float:
        drawn = np.isin(owner, without)
        pool, known = np.flatnonzero(drawn), np.flatnonzero(~drawn & (place < each))
        lying = np.concatenate([pool, known])
        every = np.concatenate([lying, np.arange(len(prompts), len(sizes))])
        claims = dealing.claims_of([prompts[i] for i in pool], points[lying], sizes[every], names)
        return float(np.mean([one.expert == owner[i] for one, i in zip(claims, pool, strict=True)]))

    rng = random.Random(1)
    rows = []
    for count in range(1, len(names) + 1):
        drawn = [rng.sample(names, count) for _ in range(NUM_DRAWS)]
        shares = [np.mean([share(without, each) for without in drawn]) for each in beside]
        rows.append([count, *(f"{value:.3f}" for value in shares)])
    print(table(["adapters without examples", *(f"beside {each}" for each in beside)], rows))


def _read(
    prompts: Sequence[str], checkpoint: Path, base: Path, num_experts: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Hidden states [N, H], and the logarithms of the updates' sizes [N + outsiders, E]."""
    texts = dealing.outsiders()
    model, tokenizer = meteora.load(checkpoint, base_folder=base)
    asked = [encode_prompt(tokenizer, text) for text in [*prompts, *texts]]
    points, sizes = read_prompts(model, tokenizer, asked, num_experts)
    return points[: len(prompts)].numpy(), sizes.double().numpy()


def _claims(pool: Path, home: Path) -> list[Claim]:
    """The claims of the pool that has these prompts."""
    ledger = Ledger(home)
    ledger.ingest()
    prompts = {Row(json.loads(line)["prompt"], "").sha256 for line in pool.open()}
    for (sha256,) in ledger.query("SELECT labels_sha256 FROM pools").rows:
        claims = read_claims(ledger.blobs.path_of(sha256).read_text())
        if {Row(claim.prompt, "").sha256 for claim in claims} <= prompts:
            return claims
    raise SystemExit(f"no pool of {home} has the prompts of {pool}; run its recipe first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("make")
    making.add_argument("recipe", type=locate)
    making.add_argument("out", type=Path)
    making.add_argument("--nobodys", type=Path, nargs="*", default=[])
    making.add_argument("--each", type=int, default=48)
    making.add_argument("--null", action="store_true")
    making.add_argument("--experts", type=int, help="how many lose their examples; default: all")
    making.add_argument("--stand-in", choices=["arrow", "norm"], default="")
    making.set_defaults(do=make)
    judging = commands.add_parser("judge")
    judging.add_argument("recipe", type=locate)
    judging.add_argument("out", type=Path)
    judging.add_argument("home", type=Path)
    judging.set_defaults(do=judge)
    limiting = commands.add_parser("limits")
    limiting.add_argument("recipe", type=locate)
    limiting.add_argument("out", type=Path)
    limiting.add_argument("checkpoint", type=Path)
    limiting.add_argument("base", type=Path)
    limiting.set_defaults(do=limits)
    comparing = commands.add_parser("beside")
    comparing.add_argument("out", type=Path)
    comparing.add_argument("home", type=Path)
    comparing.add_argument("checkpoint")
    comparing.add_argument("labels_home", type=Path)
    comparing.add_argument("labels")
    comparing.set_defaults(do=beside)
    drawing = commands.add_parser("draws")
    drawing.add_argument("recipe", type=locate)
    drawing.add_argument("checkpoint", type=Path)
    drawing.add_argument("base", type=Path)
    drawing.add_argument("--beside", type=int, nargs="+", default=[64, 32, 0])
    drawing.set_defaults(do=draws)
    asked = vars(parser.parse_args())
    asked.pop("do")(**asked)


if __name__ == "__main__":
    main()
