"""Whose prompts are whose without any example: the rule of the router `prompt`, and others.

    python -m tests.benchmarks.prompt_choice alone RECIPE OUT.yaml [--null]
    meteora run OUT.yaml --home HOME
    python -m tests.benchmarks.prompt_choice rules OUT.yaml HOME [--rows 30] [--nobodys FILE ...]

`alone` takes the examples out of a recipe, and gives it the router `prompt`. `rules` sets each rule
up on the same background texts, and reads the first test prompts of every expert once:

    whitened          the router's: (Σ + λI)^-½ with λ of 0.3 of the mean variance
    other λ           0.03 and 1
    variances alone   the diagonal of Σ
    x as it is        sizes of B A x (the norms of LoGo, arXiv 2511.07129, but by background texts)

"none fits" is the area under the curve of the largest logit: prompts of the experts against those
of `--nobodys`, files of other tasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import yaml
from scipy.stats import rankdata

import meteora
from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template, encode_prompt
from meteora.fitting import background
from meteora.model.prompt_choice import READER
from pipelines.data.labels import background_ids
from pipelines.data.row_sources import read_rows
from pipelines.flows.up_to_date import look
from pipelines.recipe.recipe import locate
from pipelines.workspace.context import RunContext
from tests.benchmarks.timing import table, tell

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OPTIONS = RouterOptions("prompt", 1, 1.0)
WHITENED = background.whitened


def by_variance(rows: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    """Rows by the root of the inverse of the diagonal of Σ + λI."""
    variance = centred.var(0)
    return rows * (variance + background.RIDGE * variance.mean()).rsqrt()


def as_it_is(rows: torch.Tensor, _centred: torch.Tensor) -> torch.Tensor:
    """The rows themselves."""
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("alone")
    making.add_argument("recipe", type=locate)
    making.add_argument("out", type=Path)
    making.add_argument("--null", action="store_true")
    comparing = commands.add_parser("rules")
    comparing.add_argument("recipe")
    comparing.add_argument("home", type=Path)
    comparing.add_argument("--rows", type=int, default=30)
    comparing.add_argument("--nobodys", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.command == "alone":
        leave_alone(arguments.recipe, arguments.out, null=arguments.null)
    else:
        compare_rules(arguments)


def leave_alone(recipe: Path, out: Path, *, null: bool) -> None:
    """Write a recipe of adapters and tests alone."""
    body = yaml.safe_load(recipe.read_text())
    for expert in body["experts"]:
        expert.pop("examples", None)
        for key in ("adapter", "test"):
            kind, _, path = expert[key].partition(":")
            expert[key] = f"{kind}:{(recipe.parent / path).absolute()}"
    body.pop("gates", None)
    body["router"] = {"kind": "prompt", "null": null}
    out.write_text(yaml.safe_dump(body, sort_keys=False))


def compare_rules(arguments: argparse.Namespace) -> None:
    """Print how many prompts each rule gives to their own expert."""
    work = RunContext.open(arguments.recipe, arguments.home)
    finished = look(work).finished
    if finished is None:
        raise SystemExit("run the recipe in this home first")
    plan = finished.plan
    folder = work.checkpoint_folder(plan.router.id)
    model, tokenizer = meteora.load(folder, base_folder=work.base_folder(plan.base))
    names, texts = list(plan.fused.names), background_ids(tokenizer)
    own = [(names.index(n), r) for n in names for r in plan.tests.get(n, [])[: arguments.rows]]
    others = [
        row
        for path in arguments.nobodys
        for row in read_rows(f"jsonl:{path.absolute()}", path.parent, arguments.rows)
    ]
    labels = torch.tensor([owner for owner, _ in own])
    prompts = [encode_prompt(tokenizer, row.prompt) for row in [*(r for _, r in own), *others]]
    rules: dict[str, tuple[Rule, float]] = {"whitened, λ 0.3 (the router)": (WHITENED, 0.3)}
    rules |= {f"whitened, λ {ridge}": (WHITENED, ridge) for ridge in (0.03, 1.0)}
    rules |= {"variances alone": (by_variance, 0.3), "x as it is": (as_it_is, 0.0)}
    lines = []
    for rule, (whitened, ridge) in rules.items():
        logits = read(model, prompts, texts, Template.of(tokenizer), whitened, ridge)
        mine = logits[: len(own)]
        right = (mine.argmax(-1) == labels).float()
        lowest = min(names, key=lambda n: right[labels == names.index(n)].mean().nan_to_num(1.0))
        share = right[labels == names.index(lowest)].mean()
        apart = auroc(mine.amax(-1), logits[len(own) :].amax(-1)) if others else float("nan")
        lines.append((rule, f"{right.mean():.3f}", f"{lowest} {share:.2f}", f"{apart:.3f}"))
    said = f"{len(own)} prompts of {len(names)} experts, {len(others)} of nobody\n\n"
    tell(said + table(("rule", "right", "lowest", "none fits, AUROC"), lines), "cpu")


def read(model, prompts, texts, template, whitened, ridge) -> torch.Tensor:
    """The logits of each prompt by one rule, [N, E]."""
    with (
        mock.patch.object(background, "whitened", whitened),
        mock.patch.object(background, "RIDGE", ridge),
    ):
        background.fit_to_background(model, texts, OPTIONS, template)
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            model(torch.tensor([prompt]), use_cache=False, logits_to_keep=1)
            found.append(getattr(model, READER).held.logits[0])
    return torch.stack(found)


def auroc(high: torch.Tensor, low: torch.Tensor) -> float:
    """How often one of `high` is above one of `low`."""
    ranks = rankdata(torch.cat([high, low]).numpy())[: len(high)]
    return float((ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


if __name__ == "__main__":
    main()
