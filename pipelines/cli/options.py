"""Options that several commands share."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from meteora.artifacts import MeteoraError

Home = Annotated[
    Path, typer.Option("--home", envvar="METEORA_HOME", help="The folder of ledger and blobs.")
]
DEFAULT_HOME = Path("~/.meteora")
Base = Annotated[
    Path | None,
    typer.Option("--base", metavar="FOLDER", help="The folder of the base, if it is local."),
]
Subfolder = Annotated[str, typer.Option(help="A subfolder of the folder or repository.")]
Strip = Annotated[bool, typer.Option("--strip", help="Leave out `modules_to_save`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
TokenFor = Annotated[
    list[str] | None,
    typer.Option(metavar="OWNER", help="Send the saved token for this owner's repositories."),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:N|mps",
        help="Where. auto: the GPU, if any; all, if one is too small.",
    ),
]


MOST = 1_000_000
"""Of anything that an option counts: larger numbers are typing errors, and overflow further on."""


class Precision(StrEnum):
    """The dtype of a base; its experts keep theirs."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Dtype = Annotated[
    Precision, typer.Option(help="Of the base, while it computes. auto: as it lies on the disk.")
]
PARTS = ("records", "blobs", "ledger.duckdb", "store.toml", "adapters", "bases", "runs", "prefect")
"""What a home holds, some of it at least."""


def text_or_input(text: str) -> str:
    """The text itself, or all of the input where it is `-`.

    Raises:
        MeteoraError: The input is no text.
    """
    try:
        return sys.stdin.read() if text == "-" else text
    except UnicodeDecodeError as error:
        raise MeteoraError(f"the input is not {error.encoding}") from error


def existing_home(home: Path) -> Path:
    """The home of a command that changes nothing, which therefore makes no new one.

    Raises:
        MeteoraError: The folder is not there, or is full of other things.
    """
    home = home.expanduser().absolute()
    there = {path.name for path in home.iterdir()} if home.is_dir() else None
    if there is None or (there and there.isdisjoint(PARTS)):
        raise MeteoraError(
            f"{home}: there is no store in it; check --home, or make one with `meteora run`"
        )
    return home
