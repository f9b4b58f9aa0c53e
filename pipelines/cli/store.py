"""`meteora store …`: looking after the ledger."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from meteora.artifacts import MeteoraError
from pipelines.cli.options import DEFAULT_HOME, Home
from pipelines.workspace.console import say

app = typer.Typer(no_args_is_help=True, help="Look after the ledger.")


@app.command()
def rebuild(home: Home = DEFAULT_HOME) -> None:
    """Make the index again from the records alone."""
    from store.ledger import Ledger

    ingested = Ledger(home.expanduser().absolute()).rebuild()
    if ingested.reason:
        raise MeteoraError(ingested.reason)
    print(f"{ingested.num_records} records in the index")


@app.command()
def pack(home: Home = DEFAULT_HOME) -> None:
    """Lay small records together in files of many; runs do so by themselves when they are many."""
    from store.ledger import Ledger

    ledger = Ledger(home.expanduser().absolute())
    num_records = ledger.pack()
    ledger.ingest()
    print(f"{num_records} records packed")


@app.command()
def share(
    url: Annotated[str, typer.Argument(help="Such as s3://bucket/prefix.")],
    home: Home = DEFAULT_HOME,
) -> None:
    """Share records and blobs with other homes, on S3 or what speaks its language."""
    from store.ledger import Ledger
    from store.sharing import connect

    home = home.expanduser().absolute()
    setting = connect(home, url)
    reason = Ledger(home).ingest().reason
    if reason:
        raise MeteoraError(reason)
    print(f"{home} shares {setting.remote} as {setting.name}")


@app.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """List the files that nothing refers to, each after its bytes; remove them only with --yes."""
    from store.ledger import Ledger

    garbage = Ledger(home.expanduser().absolute()).gc(remove=yes)
    names = (*garbage.blobs, *map(str, garbage.files))
    for name, num_bytes in zip(names, garbage.sizes, strict=True):
        print(f"{num_bytes}\t{name}")
    done = "removed" if yes else "can be removed with --yes"
    say(f"{garbage.num_bytes / 1e6:.1f} MB {done}")


@app.command()
def openlineage(
    run: Annotated[str, typer.Option(help="The id of one run; all runs without it.")] = "",
    home: Home = DEFAULT_HOME,
) -> None:
    """Print every run as OpenLineage events, one JSON object a line."""
    from pipelines.publishing.openlineage import events
    from store.ledger import Ledger

    ledger = Ledger(home.expanduser().absolute())
    ledger.ingest(deadline_seconds=1.0)
    for event in events(ledger, run):
        print(json.dumps(event))


@app.command()
def serve(
    address: Annotated[str, typer.Option(help="quack:HOST:PORT.")] = "quack:localhost:9494",
    home: Home = DEFAULT_HOME,
) -> None:
    """Let others ask the ledger through DuckDB's own server, Quack, where DuckDB has it.

    The token that they need is METEORA_TOKEN, or a new one that is printed.
    """
    import os
    import secrets

    from store.ledger import Ledger
    from store.serving import serve as serve_snapshot

    ledger = Ledger(home.expanduser().absolute())
    ledger.ingest()
    token = os.environ.get("METEORA_TOKEN") or secrets.token_urlsafe(24)
    say(f"CREATE SECRET (TYPE quack, TOKEN '{token}'); ATTACH '{address}' AS ledger")
    for url in serve_snapshot(ledger.index.snapshot, address, token):
        say(f"serving {ledger.index.snapshot} at {url}")
