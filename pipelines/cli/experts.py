"""`meteora check` judges adapters, `train` makes missing ones, `add` and `drop` change a model."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from meteora.artifacts import ArtifactId, short
from meteora.checkpoint.manifest import Manifest
from meteora.untrusted.findings import MOST_NAMED, listed
from pipelines.cli import options
from pipelines.cli.benchmark import run_benchmark
from pipelines.workspace.console import say

app = typer.Typer()
MOST_TESTS = 10_000
"""So many test rows are compared with examples. A benchmark asks as many as recorded tasks have."""
MEASURED = "SELECT id FROM scores WHERE subject_id = '{}' LIMIT 1"


@app.command()
def check(
    where: Annotated[list[str], typer.Argument(help="Folders, configs, or owner/name[@revision].")],
    as_json: options.AsJson = False,
    subfolder: options.Subfolder = "",
    strip: options.Strip = False,
    token_for: options.TokenFor = options.NONE,
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Judge adapters: a verdict for each, with coded reasons. No base is needed."""
    from pipelines.admission.check import describe, inspect

    verdicts = [
        inspect(
            name,
            home / "adapters",
            subfolder=subfolder,
            modules_to_save="strip" if strip else "refuse",
            token_for=token_for,
        )
        for name in where
    ]
    if as_json:
        print(json.dumps([verdict.to_dict() for verdict in verdicts], indent=1))
    else:
        for verdict in verdicts:
            print("\n".join(describe(verdict)))
    if any(verdict.verdict == "refuse" for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's path, or the name of a shipped one.")],
    only: Annotated[
        list[str],
        typer.Option(
            metavar="NAME", help="Train this expert only. Repeat it for more. Default: all."
        ),
    ] = options.NONE,
    rank: Annotated[
        int,
        typer.Option(min=1, max=1024, help="The adapters' rank; lora_alpha is twice as much."),
    ] = 8,
    steps: Annotated[int, options.count("Steps of eight rows each.")] = 1000,
    learning_rate: Annotated[
        float,
        typer.Option(min=1e-9, max=1.0, help="The highest rate; it then falls along a cosine."),
    ] = 5e-4,
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Train an adapter for each expert of a recipe whose `path:` folder does not exist.

    Each learns from the `examples` of its expert, but not from the rows that the gates are fitted
    to, nor from test rows. Adapters that exist do not change, so the same command continues after a
    stop. The folders of new adapters are printed.
    """
    from pipelines.stages import train_adapters
    from pipelines.workspace.context import RunContext

    asked = train_adapters.Training(rank, steps, learning_rate)
    try:
        for folder in train_adapters.train(RunContext.open(recipe, home), asked, only):
            print(folder, flush=True)
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on, with the adapter that was not done")
        raise typer.Exit(130) from None


@app.command()
def add(
    checkpoint: options.Checkpoint,
    name: Annotated[str, typer.Argument(help="The name of the new expert.")],
    adapter: Annotated[str, typer.Argument(help="A folder, or owner/name[@revision].")],
    examples: Annotated[str, typer.Argument(help="Its examples, such as jsonl:sums/train.jsonl.")],
    test: Annotated[
        str, typer.Option(metavar="ROWS", help="Its held-out rows: measure the result at once.")
    ] = "",
    base: options.Base = None,
    subfolder: options.Subfolder = "",
    strip: options.Strip = False,
    token_for: options.TokenFor = options.NONE,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Add an expert: write a new checkpoint. Only the new expert's own examples are needed."""
    from pipelines.admission import checkpoints
    from pipelines.admission.candidate import Candidate
    from pipelines.admission.sources import token_of_rows
    from pipelines.data.row_sources import read_rows, row_place
    from pipelines.data.rows import refuse_overlap
    from pipelines.planning.recorded_tasks import recorded_tasks
    from pipelines.stages import edit
    from pipelines.stages.benchmark import BenchmarkRequest
    from store.ledger import Ledger

    candidate = Candidate(
        name, adapter, subfolder, "strip" if strip else "refuse", tuple(token_for)
    )
    candidate.find_folder()  # if there is none, that is told before rows and checkpoint are read
    if test:
        here, token_of = Path.cwd(), token_of_rows(candidate.recipe.hub)
        refuse_overlap(
            {name: read_rows(examples, here, edit.EXAMPLES, token_of)},
            {name: read_rows(test, here, MOST_TESTS, token_of)},
            lambda _name, number: row_place(examples, here, number),
            lambda _name, number: row_place(test, here, number),
        )
    found = checkpoints.find(
        checkpoint, home, base, token_for, statistics=True, device=device, dtype=dtype
    )
    made = edit.add(Ledger(home), found, candidate, examples)
    manifest = _print_made(made, f"added {name}", found.folder, as_json=as_json)
    if test:
        request = BenchmarkRequest((f"{name}={test}",), token_for=tuple(token_for))
        found = replace(found, folder=made)
        run_benchmark(found, home, request, as_json=as_json)
    else:
        newest = {name: ArtifactId(manifest.experts[-1].adapter_id)}
        asked = recorded_tasks(Ledger(home), manifest.base.spec.id, newest)
        rows = "" if asked else f" --tasks {name}=jsonl:FILE"
        _say_next(made, manifest, home, base, rows)


@app.command()
def drop(
    checkpoint: options.Checkpoint,
    name: Annotated[str, typer.Argument(help="The expert to leave out.")],
    benchmark: Annotated[bool, typer.Option("--benchmark", help="Measure the result at once.")] = (
        False
    ),
    base: options.Base = None,
    token_for: options.TokenFor = options.NONE,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Drop an expert: write a new checkpoint. The weights of all others stay the same.

    A model is loaded with --benchmark only.
    """
    from pipelines.admission import checkpoints
    from pipelines.stages import edit
    from pipelines.stages.benchmark import BenchmarkRequest
    from store.ledger import Ledger

    folder = checkpoints.find_folder(checkpoint, home, token_for, statistics=True)
    made = edit.drop(Ledger(home), folder, name)
    manifest = _print_made(made, f"dropped {name}", folder, as_json=as_json)
    if benchmark:
        found = checkpoints.find(str(made), home, base, token_for, device=device, dtype=dtype)
        run_benchmark(found, home, BenchmarkRequest(), as_json=as_json)
    else:
        _say_next(made, manifest, home, base)


def _print_made(made: Path, what: str, before: Path, *, as_json: bool) -> Manifest:
    """Print the folder of a changed checkpoint, its id, and what changed; returns its manifest."""
    from meteora.checkpoint.manifest import read_manifest

    manifest, old = read_manifest(made), read_manifest(before)
    names = manifest.names
    say(f"{what}: {short(manifest.router_id)} has {listed(names, MOST_NAMED)}")
    say(f"all others have the weights and the gate rows of {short(old.router_id)}, bit for bit")
    facts = {
        "checkpoint": str(made),
        "router_id": manifest.router_id,
        "grown_from": old.router_id,
        "experts": names,
    }
    print(json.dumps(facts) if as_json else made)
    return manifest


def _say_next(
    made: Path, manifest: Manifest, home: Path, base: Path | None, rows: str = ""
) -> None:
    """Say how to measure a changed checkpoint, or to see its scores if it was measured before.

    Args:
        rows: the option for rows to measure it on; empty if some are recorded
    """
    from pipelines.workspace.checkpoints import base_option
    from store.ledger import Ledger

    where = base_option(manifest.base.repo_id, base)
    ledger, router_id = Ledger(home), ArtifactId(manifest.router_id)
    name = shlex.quote(str(made)) if ledger.built(router_id) is None else short(router_id)
    if ledger.scores(MEASURED.format(router_id)):
        say(f"it was measured before; see its scores with `meteora report {name}{where}`")
    else:
        say(f"it has no scores yet; measure it with `meteora benchmark {name}{where}{rows}`")
