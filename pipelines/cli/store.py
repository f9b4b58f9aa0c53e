"""The ledger: `meteora sql` queries it, `verify` checks it, `store …` maintains it."""

import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from meteora.artifacts import MeteoraError
from meteora.untrusted.findings import counted
from pipelines.cli import options, output
from pipelines.workspace.console import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from store.garbage import Removable

NUM_SCORES = 20
"""Scores that `verify` computes again."""
NUM_ANSWERS = 24
"""Recorded answers that `verify` asks a server for again."""

app = typer.Typer()
store = typer.Typer(no_args_is_help=True, help="Maintain the ledger.")
app.add_typer(store, name="store")


@app.command()
def sql(
    query: Annotated[
        str, typer.Argument(help='Such as "FROM leaderboard"; `-` reads standard input.')
    ] = "SHOW TABLES",
    form: Annotated[
        output.Format | None,
        typer.Option("--format", help="Default: a table in a terminal, else CSV."),
    ] = None,
    as_json: options.AsJson = False,
    examples: Annotated[bool, typer.Option("--examples", help="Print example queries.")] = False,
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Query the ledger with one SELECT."""
    from store.query import Answer
    from store.query import examples as questions

    form = output.form_of(form, as_json=as_json)
    if examples and form:
        output.print_answer(Answer(("title", "query"), list(questions())), form)
        return
    if examples:
        for title, question in questions():
            print(f"/* {title} */\n{question}\n")
        return
    ledger = options.open_ledger(home)
    # what a run recorded a moment ago; a busy index is not waited for
    ledger.ingest(deadline_seconds=1.0)
    answer = ledger.query(options.text_or_input(query))
    output.print_answer(answer, form or ("table" if sys.stdout.isatty() else "csv"))


@app.command()
def notebook(
    out: Annotated[Path, options.output("The file to write.")] = Path("notebook.py"),
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Write a marimo notebook with queries of the ledger and plots; it is a Python file."""
    from pipelines.reports.html import write_notebook

    write_notebook(out, options.open_ledger(home).home)
    print(out)
    if find_spec("marimo") is None:
        say("marimo is not installed; run `pip install 'meteora-pipelines[notebook]'`", "note")
    name = quote(str(out))
    say(f"open it with `marimo edit --skip-update-check {name}`; `python {name}` runs all of it")


@app.command()
def verify(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint, with --key or --served. Default: the store."),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="The public key of the signer.")] = None,
    scores: Annotated[
        int | None,
        options.count(
            "For the store: how many scores to compute again, drawn at random."
            f" Default: {NUM_SCORES}.",
            least=0,
        ),
    ] = None,
    served: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="A server with OpenAI's interface, to ask. Its key, if any, is METEORA_API_KEY.",
        ),
    ] = "",
    answers: Annotated[
        int | None,
        options.count(
            f"With --served: how many recorded answers to ask for again. Default: {NUM_ANSWERS}."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(help="With --served: the model's name there. Default: the first listed."),
    ] = "",
    token_for: options.TokenFor = options.NONE,
    as_json: options.AsJson = False,
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Check blobs and bases against their hashes, records against blobs, scores against outputs.

    With a checkpoint and --key, check the checkpoint's files against its signature. With a
    checkpoint and --served, ask a server for recorded answers again.
    """
    if served:
        if checkpoint is None or key is not None or scores is not None:
            raise typer.BadParameter("to ask a server, give CHECKPOINT, no --key and no --scores")
        from meteora.checkpoint.manifest import read_manifest
        from pipelines.admission.checkpoints import find_folder

        find = partial(find_folder, str(checkpoint), home, token_for)
        folder = find(whole=False)
        if not read_manifest(folder).files:  # as earlier versions wrote it: tensors are compared
            folder = find()
        if not _serves(folder, home, served, answers or NUM_ANSWERS, model, as_json=as_json):
            raise typer.Exit(1)
        return
    if model or token_for or answers is not None:
        raise typer.BadParameter("--answers, --model and --token-for go with --served URL")
    if checkpoint is not None or key is not None:
        if checkpoint is None or key is None or scores is not None:
            raise typer.BadParameter(
                "to check a signature, give both CHECKPOINT and --key; to ask a server, --served;"
                " to check the store, neither, and --scores if you like"
            )
        from pipelines.publishing.signing import check_signature
        from pipelines.workspace.checkpoints import checkpoint_folder

        check_signature(checkpoint_folder(str(checkpoint), home), key)
        if as_json:
            print(json.dumps({"checkpoint": str(checkpoint), "key": str(key), "signed": True}))
        else:
            print(f"{checkpoint} is what the owner of {key} signed")
        return
    from pipelines.scoring.recompute import recompute_scores
    from pipelines.workspace.bases import verify_bases

    ledger = options.open_ledger(home)
    stored, bases = ledger.verify(), list(verify_bases(ledger))
    recomputed = recompute_scores(ledger, NUM_SCORES if scores is None else scores)
    if output.print_findings(stored, bases, recomputed, as_json=as_json):
        raise typer.Exit(1)


def _serves(folder: Path, home: Path, url: str, count: int, model: str, *, as_json: bool) -> bool:
    """Print whether a server gives the recorded answers of a checkpoint."""
    import os

    from meteora.artifacts import ArtifactId
    from meteora.checkpoint.manifest import read_manifest
    from pipelines.admission.checkpoints import FoundCheckpoint
    from pipelines.scoring.served import KEY, Server, recorded_answers
    from pipelines.stages.adopt import as_recorded

    ledger = options.open_ledger(home)
    folder = as_recorded(ledger, FoundCheckpoint(folder)).folder
    asked = recorded_answers(ledger, ArtifactId(read_manifest(folder).router_id), count)
    server = Server(url, model, os.environ.get(KEY, ""))
    found = server.answers(asked)
    return output.print_served(server, asked, found, as_json=as_json)


@store.command()
def rebuild(home: options.Home = options.DEFAULT_HOME) -> None:
    """Build the index again from the records."""
    ingested = options.open_ledger(home).rebuild()
    if ingested.reason:
        raise MeteoraError(ingested.reason)
    print(f"{counted(ingested.num_records, 'record')} in the index")


@store.command()
def pack(home: options.Home = options.DEFAULT_HOME) -> None:
    """Pack many small records into few files. Runs do it themselves once there are very many."""
    ledger = options.open_ledger(home)
    num_records = ledger.pack()
    ledger.ingest()
    print(f"{counted(num_records, 'record')} packed")


@store.command()
def share(
    url: Annotated[str, typer.Argument(help="Such as s3://bucket/prefix.")],
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Share records and blobs with other homes through S3, or storage with the same protocol."""
    from store.ledger import Ledger
    from store.sharing import connect

    Ledger(home).close_killed()  # by the name that the home has had so far
    setting = connect(home, url)
    print(f"{home} shares {setting.remote} as {setting.name}")
    if reason := Ledger(home).ingest(restore=True).reason:
        raise MeteoraError(reason)


@store.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Remove the listed files.")] = False,
    home: options.Home = options.DEFAULT_HOME,
    as_json: options.AsJson = False,
) -> None:
    """List files that nothing refers to, with their sizes in bytes; remove them with --yes.

    Work of runs that were stopped an hour ago or earlier is among them: without it the next run
    begins anew what it would have continued.
    """
    _print_files(options.open_ledger(home).gc(remove=yes), removed=yes, as_json=as_json)


@store.command()
def free(
    checkpoints: Annotated[list[str], typer.Argument(help="Their ids or folders.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete the listed files.")] = False,
    home: options.Home = options.DEFAULT_HOME,
    as_json: options.AsJson = False,
) -> None:
    """List the files that no other model of the home needs; delete them with --yes.

    Scores and lineage stay. The next run of its recipe, or the same `add` or `drop`, makes a model
    again, without a benchmark.
    """
    from pipelines.publishing.signing import is_signed
    from pipelines.workspace.checkpoints import files_to_free

    ledger = options.open_ledger(home)

    def find() -> "list[Removable]":
        found = files_to_free(ledger, checkpoints)
        for one in found:
            if is_signed(one.path):
                say(f"{one.path} is signed; if it is made again, it has no signature", "note")
        return found

    _print_files(ledger.free(find) if yes else find(), removed=yes, as_json=as_json)


def _print_files(found: "Sequence[Removable]", *, removed: bool, as_json: bool) -> None:
    if as_json:
        rows = [{"name": one.name, "num_bytes": one.num_bytes} for one in found]
        print(json.dumps(rows, indent=1))
    else:
        for one in found:
            print(f"{one.num_bytes}\t{one.name}")
    done = "removed" if removed else "can be removed with --yes"
    size = f"{sum(one.num_bytes for one in found) / 1e6:.1f} MB {done}"
    say(size if found else "there is nothing to remove")


@store.command()
def openlineage(
    run: Annotated[str, typer.Option(help="The id of one run. Default: all runs.")] = "",
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Print runs as OpenLineage events, one JSON object a line."""
    from pipelines.publishing.openlineage import events

    ledger = options.open_ledger(home)
    ledger.ingest(deadline_seconds=1.0)
    found = list(events(ledger, run))
    if run and not found:
        raise MeteoraError(f'{run}: the ledger has no such run; `meteora sql "FROM runs"` has all')
    for event in found:
        print(json.dumps(event))


@store.command()
def serve(
    address: Annotated[str, typer.Option(help="quack:HOST:PORT.")] = "quack:localhost:9494",
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Let others query the ledger through Quack, DuckDB's own server, if DuckDB has it.

    They need the token in METEORA_TOKEN; without that variable a new token is made and printed.
    """
    import os
    import secrets

    from store.serving import serve as serve_snapshot

    ledger = options.open_ledger(home)
    ledger.ingest()
    of_user = os.environ.get("METEORA_TOKEN")
    token = of_user or secrets.token_urlsafe(24)
    shown = "…" if of_user else token  # a user's own may not go into logs
    for url in serve_snapshot(ledger.index.snapshot, address, token):
        say(f"serving {ledger.index.snapshot} at {url}")
        say(f"CREATE SECRET (TYPE quack, TOKEN '{shown}'); ATTACH '{address}' AS ledger")
