"""Experts: `meteora check` judges adapters, `add` and `drop` change a checkpoint by one expert."""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003  (Typer reads the annotations)
from typing import Annotated

import typer

from pipelines.cli.options import DEFAULT_HOME, Home, Strip, Subfolder, TokenFor

app = typer.Typer()


@app.command()
def check(
    where: Annotated[list[str], typer.Argument(help="Folders, configs, or owner/name[@revision].")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    subfolder: Subfolder = "",
    strip: Strip = False,
    token_for: TokenFor = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Judge adapters: a verdict with coded reasons for each. No base is needed."""
    from pipelines.admission.check import describe, inspect

    cache = home.expanduser().absolute() / "adapters"
    verdicts = [
        inspect(
            name,
            cache,
            subfolder=subfolder,
            modules_to_save="strip" if strip else "refuse",
            token_for=token_for or (),
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
def add(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a Hub id, or an id of the ledger.")],
    name: Annotated[str, typer.Argument(help="The name of the new expert.")],
    adapter: Annotated[str, typer.Argument(help="A folder, or owner/name[@revision].")],
    examples: Annotated[str, typer.Argument(help="Its examples, such as jsonl:sums/train.jsonl.")],
    base: Annotated[
        Path | None, typer.Option(help="The folder of the base, if it is local.")
    ] = None,
    subfolder: Subfolder = "",
    strip: Strip = False,
    token_for: TokenFor = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Add an expert: write a new checkpoint. Only the new expert's own examples are needed."""
    from pipelines.admission import checkpoints
    from pipelines.admission.candidate import Candidate
    from pipelines.stages import edit
    from store.ledger import Ledger

    home = home.expanduser().absolute()
    found = checkpoints.find(checkpoint, home, base, token_for or (), statistics=True)
    candidate = Candidate(
        name, adapter, subfolder, "strip" if strip else "refuse", tuple(token_for or ())
    )
    made = edit.add(
        Ledger(home),
        found.folder,
        candidate,
        examples,
        base_folder=found.base_folder,
        download=found.download,
    )
    print(made)


@app.command()
def drop(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a Hub id, or an id of the ledger.")],
    name: Annotated[str, typer.Argument(help="The expert to leave out.")],
    token_for: TokenFor = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """Drop an expert: write a new checkpoint. The weights of all others stay the same."""
    from pipelines.admission import checkpoints
    from pipelines.stages import edit
    from store.ledger import Ledger

    home = home.expanduser().absolute()
    folder = checkpoints.find_folder(checkpoint, home, token_for or (), statistics=True)
    print(edit.drop(Ledger(home), folder, name))
