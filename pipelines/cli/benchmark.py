"""`meteora benchmark`: a checkpoint is measured, with or without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli import options

if TYPE_CHECKING:
    from pipelines.admission.checkpoints import FoundCheckpoint
    from pipelines.stages.benchmark import BenchmarkRequest

app = typer.Typer()


@app.command()
def benchmark(
    checkpoint: options.Checkpoint,
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="NAME[=ROWS]",
            help="A task, or new rows for it, such as sums=jsonl:test.jsonl. Repeat it for more."
            " Default: all tasks that its experts were asked before.",
        ),
    ] = options.NONE,
    compare: Annotated[
        list[str],
        typer.Option(
            metavar="SYSTEM",
            help="A system to compare with. Repeat it for more. Default: base, oracle.",
        ),
    ] = options.NONE,
    recipe: Annotated[
        str, typer.Option(help="Use the tests and the section `benchmark` of this recipe.")
    ] = "",
    base: options.Base = None,
    token_for: options.TokenFor = options.NONE,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Measure a checkpoint, such as one that `add` or `drop` made; scores go to the ledger.

    Without a recipe it is asked the recorded test rows of its experts. Recorded scores, such as
    the base's, are not measured again, also with another device or dtype. A checkpoint that was
    made elsewhere is added to the ledger under a new id.
    """
    from pipelines.admission import checkpoints
    from pipelines.recipe.recipe import locate
    from pipelines.stages.benchmark import BenchmarkRequest

    found = checkpoints.find(checkpoint, home, base, token_for, device=device, dtype=dtype)
    path = locate(recipe) if recipe else None
    request = BenchmarkRequest(tuple(tasks), tuple(compare), path, tuple(token_for))
    run_benchmark(found, home, request, as_json=as_json)


def run_benchmark(
    found: FoundCheckpoint, home: Path, request: BenchmarkRequest, *, as_json: bool
) -> None:
    """Measure a checkpoint and print its table of scores."""
    from pipelines.cli.score_table import print_scores
    from pipelines.stages.benchmark import benchmark as measure
    from store.ledger import Ledger

    folder, plan, summary = measure(Ledger(home), found, request)
    name, base = " + ".join(plan.fused.names), found.base_folder
    print_scores(name, folder, plan, summary, {}, base=base, as_json=as_json)
