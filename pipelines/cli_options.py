"""Options that every command has, said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path, typer.Option("--home", envvar="METEORA_HOME", help="Where ledger and blobs live.")
]
DEFAULT_HOME = Path("~/.meteora")
