"""Options of several commands, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path, typer.Option("--home", envvar="METEORA_HOME", help="Where ledger and blobs live.")
]
DEFAULT_HOME = Path("~/.meteora")
Subfolder = Annotated[str, typer.Option(help="Where in the folder or repository.")]
Strip = Annotated[bool, typer.Option("--strip", help="Leave saved modules out, as a recipe may.")]
TokenFor = Annotated[
    list[str] | None, typer.Option(metavar="OWNER", help="Whom the saved token is sent to.")
]
