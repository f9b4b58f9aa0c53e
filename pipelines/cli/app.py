"""The command line: data to stdout, progress and warnings to stderr.

Exit codes: 0 done, 1 refused or failed (with one sentence), 2 wrong usage, 130 interrupted.
"""

import os
import re
import sys
import traceback
from importlib.metadata import version
from io import TextIOWrapper
from typing import Annotated

import typer

from meteora.artifacts import MeteoraError
from pipelines.cli import benchmark, chat, checkpoint, experts, recipe, run, store
from pipelines.workspace.console import CONSOLE, QUIET, say
from pipelines.workspace.environment import prepare
from pipelines.workspace.faults import describe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # else brackets are markup, and docstrings keep their line breaks
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Off-the-shelf LoRA adapters in; one routed model out.",
)
for part in (run, benchmark, experts, recipe, checkpoint, chat, store):
    app.add_typer(part.app)
EVERYWHERE = ("--quiet", "--verbose")
"""Options of the program itself, which are also possible after a command."""
LONG_WORD = re.compile(r"\S{400,}")
"""An argument that can only be a mistake or an attack, such as a number of 5,000 digits."""


def _print_version(asked: bool) -> None:
    if asked:
        print(f"meteora-pipelines {version('meteora-pipelines')}")
        raise typer.Exit


@app.callback()
def options(
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print only data and errors, no progress.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With an error, print its traceback.")
    ] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Off-the-shelf LoRA adapters in; one routed model out."""
    CONSOLE.quiet = quiet
    os.environ[QUIET] = "1" if quiet else ""  # for processes that this one starts
    if verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO")
    prepare()


def main() -> None:
    """Run the command line.

    An error of ours, and a fault of the machine, is printed as one sentence, with exit code 1.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # some services start a program with closed streams
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115  (until the end)
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have bytes of no UTF-8
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    first = [word for word in words[:end] if word in EVERYWHERE]
    sys.argv[1:] = [*first, *(word for word in words[:end] if word not in first), *words[end:]]
    try:
        app()
    except Exception as error:
        sentence = str(error) if isinstance(error, MeteoraError) else describe(error)
        if sentence is None:
            raise
        if "--verbose" in first:
            traceback.print_exc()
        say(LONG_WORD.sub(lambda word: f"{word[0][:100]}…{word[0][-100:]}", sentence), "error")
        sys.exit(1)
