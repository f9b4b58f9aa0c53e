"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path, typer.Option("--home", envvar="METEORA_HOME", help="The folder of ledger and blobs.")
]
DEFAULT_HOME = Path("~/.meteora")
Subfolder = Annotated[str, typer.Option(help="A subfolder of the folder or repository.")]
Strip = Annotated[bool, typer.Option("--strip", help="Leave out `modules_to_save`.")]
TokenFor = Annotated[
    list[str] | None,
    typer.Option(metavar="OWNER", help="Send the saved token for this owner's repositories."),
]
