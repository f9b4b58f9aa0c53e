"""The command line: data to stdout, progress and warnings to stderr.

Exit codes: 0 done, 1 refused or failed (with one sentence), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from meteora.artifacts import MeteoraError
from pipelines.cli import benchmark, chat, checkpoint, experts, run, store
from pipelines.workspace.console import say
from pipelines.workspace.faults import describe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Off-the-shelf LoRA adapters in; one routed model out.",
)
for commands in (run.app, benchmark.app, experts.app, checkpoint.app, chat.app, store.app):
    app.add_typer(commands)


def main() -> None:
    """Run the command line.

    An error of ours, and a fault of the machine, is printed as one sentence, with exit code 1.
    """
    try:
        app()
    except MeteoraError as error:
        say(str(error), "error")
        sys.exit(1)
    except Exception as error:
        sentence = describe(error)
        if sentence is None:
            raise
        say(sentence, "error")
        sys.exit(1)
