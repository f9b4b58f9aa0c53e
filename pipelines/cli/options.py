"""Options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from meteora.artifacts import MeteoraError

if TYPE_CHECKING:
    from typer.models import OptionInfo

    from store.ledger import Ledger


def _absolute(folder: Path) -> Path:
    return folder.expanduser().absolute()


Home = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar="METEORA_HOME",
        callback=_absolute,
        help="The folder of ledger and blobs.",
    ),
]
DEFAULT_HOME = Path("~/.meteora")
BYTE_ORDER_MARK = "\ufeff"
"""Some programs begin a text with it."""
Checkpoint = Annotated[
    str, typer.Argument(help="A folder, owner/name[@revision], or an id of the ledger.")
]
OwnCheckpoint = Annotated[str, typer.Argument(help="A folder, or an id of the ledger.")]
Expert = Annotated[
    str, typer.Option(help="Route every token to this expert; `(base)`: to no expert.")
]
Base = Annotated[
    Path | None,
    typer.Option("--base", metavar="FOLDER", help="The folder of the base, if it is local."),
]
Subfolder = Annotated[str, typer.Option(help="A subfolder of the folder or repository.")]
Strip = Annotated[bool, typer.Option("--strip", help="Leave out `modules_to_save`.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
NONE: list[str] = []
"""The default of options that may be repeated."""
TokenFor = Annotated[
    list[str],
    typer.Option(metavar="OWNER", help="Send the saved token for this owner's repositories."),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:N|mps",
        help="Where to compute. auto: the GPU, if any; all GPUs if one is too small.",
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="The base's dtype in memory. auto: that of its files; float32 from GGUF."),
]
MOST = 1_000_000
"""The limit of options that are counts: larger ones are typing errors, and would overflow later."""


def count(text: str, least: int = 1) -> OptionInfo:
    """An option that is a count, with its help."""
    return typer.Option(min=least, max=MOST, help=text)


def output(text: str) -> OptionInfo:
    """The option of what a command writes, with its help."""
    return typer.Option("--output", "-o", help=text)


PARTS = ("records", "blobs", "ledger.duckdb", "store.toml", "locks")
"""What tells a home from a project's folder, which may have `adapters` and `runs`, too."""


def text_or_input(text: str) -> str:
    """The text itself, or the whole standard input for `-`.

    Raises:
        MeteoraError: It is no UTF-8.
    """
    what = "input" if text == "-" else "text"
    try:
        text = sys.stdin.read().removeprefix(BYTE_ORDER_MARK) if text == "-" else text
        text.encode()  # fails for arguments with bytes that are no UTF-8: Python made surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise MeteoraError(f"the {what} is not {error.encoding}") from error
    return text


def open_ledger(home: Path) -> Ledger:
    """The ledger of a home, for a command that only reads and so must not make a new home.

    Raises:
        MeteoraError: The folder does not exist, or has only other files.
    """
    from store.ledger import Ledger

    names = {path.name for path in home.iterdir()} if home.is_dir() else None
    if names is None or (names and names.isdisjoint(PARTS)):
        raise MeteoraError(
            f"{home}: there is no store in it; check --home, or make one with `meteora run`"
        )
    return Ledger(home)
