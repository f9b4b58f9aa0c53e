"""An expert more or less: `meteora add`, `meteora drop`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  (Typer reads the annotations)
from typing import Annotated

import typer

from pipelines.cli.options import DEFAULT_HOME, Home, Strip, Subfolder, TokenFor

app = typer.Typer()


@app.command()
def add(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a Hub id, or an id of the ledger.")],
    name: Annotated[str, typer.Argument(help="What to call the new expert.")],
    adapter: Annotated[str, typer.Argument(help="A folder, or owner/name[@revision].")],
    examples: Annotated[str, typer.Argument(help="Its examples, such as jsonl:sums/train.jsonl.")],
    base: Annotated[Path | None, typer.Option(help="The folder that the base lies in.")] = None,
    subfolder: Subfolder = "",
    strip: Strip = False,
    token_for: TokenFor = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """One expert more, from its own examples alone: a new checkpoint beside the one given."""
    from meteora.checkpoint.resolve import find_checkpoint
    from pipelines.admission.candidate import Candidate
    from pipelines.stages import edit
    from pipelines.workspace.checkpoints import base_at_hand, checkpoint_folder
    from store.ledger import Ledger

    home = home.expanduser().absolute()
    folder = find_checkpoint(checkpoint_folder(checkpoint, home), statistics=True)
    base_folder = base or base_at_hand(folder, home)
    candidate = Candidate(
        name, adapter, subfolder, "strip" if strip else "refuse", tuple(token_for or ())
    )
    print(edit.add(Ledger(home), folder, candidate, examples, base_folder=base_folder))


@app.command()
def drop(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a Hub id, or an id of the ledger.")],
    name: Annotated[str, typer.Argument(help="The expert to do without.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """One expert less: a new checkpoint, in which the others' numbers are as they were."""
    from meteora.checkpoint.resolve import find_checkpoint
    from pipelines.stages import edit
    from pipelines.workspace.checkpoints import checkpoint_folder
    from store.ledger import Ledger

    home = home.expanduser().absolute()
    folder = find_checkpoint(checkpoint_folder(checkpoint, home), statistics=True)
    print(edit.drop(Ledger(home), folder, name))
