"""The command line: data to stdout, progress and warnings to stderr.

Exit codes: 0 done, 1 refused or failed with a sentence, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path  # noqa: TC003  (typer reads annotations)
from typing import Annotated

import typer

from meteora.artifacts import MeteoraError
from pipelines.cli import checkpoint, experts, output, run, store
from pipelines.cli.options import DEFAULT_HOME, Home, Strip, Subfolder, TokenFor
from pipelines.workspace.console import say

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Off-the-shelf LoRA adapters in; one routed model out.",
)
app.add_typer(checkpoint.app)
app.add_typer(experts.app)
app.add_typer(run.app)
app.add_typer(store.app, name="store")


@app.command()
def check(
    where: Annotated[list[str], typer.Argument(help="Folders, configs, or owner/name[@revision].")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    subfolder: Subfolder = "",
    strip: Strip = False,
    token_for: TokenFor = None,
    home: Home = DEFAULT_HOME,
) -> None:
    """The verdict on adapters, with coded reasons; no weights of a base are needed."""
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
def sql(
    query: Annotated[str, typer.Argument(help='Such as "FROM leaderboard".')] = "SHOW TABLES",
    form: Annotated[
        output.Format | None, typer.Option("--format", help="Table by default.")
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Ask the index, not its snapshot.")] = False,
    examples: Annotated[bool, typer.Option("--examples", help="Questions to start from.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """Ask the ledger. One SELECT; a table in a terminal, CSV in a pipe."""
    from store.ledger import Ledger
    from store.query import examples as questions

    if examples:
        for title, question in questions():
            print(f"-- {title}\n{question}\n")
        return
    ledger = Ledger(home.expanduser().absolute())
    ledger.ingest(deadline_seconds=1.0)  # what a run recorded a moment ago; a busy index can wait
    answer = ledger.query(query, live=live)
    output.answer(
        answer, form or (output.Format.table if sys.stdout.isatty() else output.Format.csv)
    )


@app.command()
def verify(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A signed checkpoint's folder; the store without one.")
    ] = None,
    key: Annotated[
        Path | None, typer.Option(help="The public key of whoever signed the checkpoint.")
    ] = None,
    scores: Annotated[int, typer.Option(min=0, help="Scores to compute again, drawn anew.")] = 20,
    home: Home = DEFAULT_HOME,
) -> None:
    """Check blobs against their hashes, records against blobs, and scores against their outputs.

    With a checkpoint and --key: its files against its signature.
    """
    if checkpoint is not None or key is not None:
        if checkpoint is None or key is None:
            raise typer.BadParameter("a signature is checked with both, CHECKPOINT and --key")
        from pipelines.publishing.signing import check_signature

        check_signature(checkpoint, key)
        print(f"{checkpoint} is what the owner of {key} signed")
        return
    from pipelines.scoring.recompute import recompute_scores
    from store.ledger import Ledger

    ledger = Ledger(home.expanduser().absolute())
    if output.findings(ledger.verify(), recompute_scores(ledger, scores)):
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; every refusal is one sentence and exit code 1."""
    try:
        app()
    except MeteoraError as error:
        say(str(error), "error")
        sys.exit(1)
