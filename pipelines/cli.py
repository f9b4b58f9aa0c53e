"""The command line: data to stdout, progress and warnings to stderr.

Exit codes: 0 done, 1 refused or failed with a sentence, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from meteora.artifacts import MeteoraError
from pipelines import show
from pipelines.environment import has_server, prepare
from pipelines.progress import say
from pipelines.recipe import Stage

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Off-the-shelf LoRA adapters in; one routed model out.",
)
store_app = typer.Typer(no_args_is_help=True, help="Look after the ledger.")
app.add_typer(store_app, name="store")

Home = Annotated[
    Path, typer.Option("--home", envvar="METEORA_HOME", help="Where ledger and blobs live.")
]
DEFAULT_HOME = Path("~/.meteora")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's path, or the name of a shipped one.")],
    until: Annotated[Stage, typer.Option(help="Stop after this stage.")] = Stage.benchmark,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """The main job: download, check, stack, fit gates, benchmark, record."""
    home = home.expanduser().absolute()
    prepare(home)
    from pipelines.finished import finished
    from pipelines.workplace import Workplace

    work = Workplace.open(recipe, home)
    planned = finished(work)
    if dry_run:
        from pipelines import preview

        preview.steps(work, planned)
        return
    seconds: dict[str, float] = {}
    if planned is None:
        try:
            if not has_server():
                from pipelines.server import start_server

                say(
                    "starting a local Prefect server for this run; set PREFECT_API_URL to use yours"
                )
                start_server(home)
            from pipelines import flows

            seconds = flows.fuse_adapters(recipe, str(home), until)
        except KeyboardInterrupt:
            say("interrupted; run the same command again to go on")
            raise typer.Exit(130) from None
        planned = finished(work) if until is Stage.benchmark else None
    else:
        say(f"{work.name}: everything is in the ledger already, nothing to do")
    if planned is not None:
        show.summary(work, planned, seconds)


@app.command()
def check(
    where: Annotated[list[str], typer.Argument(help="Folders, configs, or owner/name[@revision].")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """The verdict on adapters, with coded reasons; no weights of a base are needed."""
    from meteora import adapters
    from pipelines import hub

    def judge(name: str) -> adapters.Verdict:
        path = Path(name.removeprefix("path:"))
        if not path.exists() and hub.REPO_ID.fullmatch(name.partition("@")[0]):
            try:
                path = hub.download(hub.resolve(name), home.expanduser().absolute() / "adapters")
            except hub.HubError as error:
                return adapters.Verdict(name, "refuse", (adapters.Reason("hub", str(error)),))
        return adapters.check(path)

    verdicts = [judge(name) for name in where]
    if as_json:
        print(json.dumps([verdict.to_dict() for verdict in verdicts], indent=1))
    else:
        for verdict in verdicts:
            print(f"{verdict.verdict:7} {verdict.path}")
            for reason in verdict.reasons:
                print(f"        {reason.message} [{reason.code}]")
    if any(verdict.verdict == "refuse" for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a Hub id, or an id of the ledger.")],
    prompt: str,
    expert: Annotated[str, typer.Option(help="Send every token to this expert.")] = "",
    max_new_tokens: int = 256,
    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE.html",
            help="Show which expert took each token: on a page, and here in colours; - for these.",
        ),
    ] = "",
    home: Home = DEFAULT_HOME,
) -> None:
    """Answer one prompt with a fused model."""
    import meteora
    from meteora.generate import answer
    from meteora.trace import trace_prompt
    from pipelines.page import check_writable, write_page
    from pipelines.trace_view import page

    if trace not in {"", "-"}:
        check_writable(Path(trace))
    home = home.expanduser().absolute()
    folder = _checkpoint(checkpoint, home)
    model, tokenizer = meteora.load(folder, base_folder=_base_at_hand(folder, home))
    forced = meteora.force_expert(model, expert) if expert else nullcontext()
    with forced:
        if trace:
            found = trace_prompt(model, tokenizer, prompt, max_new_tokens=max_new_tokens)
            show.trace(found)
            if trace != "-":
                write_page(Path(trace), page(found, prompt))
        else:
            answer(model, tokenizer, prompt, max_new_tokens=max_new_tokens, stream=True)


def _checkpoint(name: str, home: Path) -> str | Path:
    """The folder of a checkpoint that the ledger knows by an id; any other name as it is."""
    from store.errors import UnknownError
    from store.ledger import Ledger

    if Path(name).is_dir() or "/" in name:
        return name
    digest = Ledger(home).resolve(name).partition(":")[2]
    folder = home / "checkpoints" / digest[:16]
    if not folder.is_dir():
        raise UnknownError(
            f"{name} is no checkpoint under {home / 'checkpoints'}; give the id of a router, as"
            " `meteora run` prints it"
        )
    return folder


def _base_at_hand(folder: str | Path, home: Path) -> Path | None:
    """The base of a checkpoint where this home has it as safetensors already."""
    from meteora.artifacts import BaseSpec
    from meteora.checkpoint import MANIFEST, read_manifest

    if not (Path(folder) / MANIFEST).is_file():
        return None
    entry = read_manifest(Path(folder)).base
    kept = home / "bases" / BaseSpec(entry.repo_id, entry.revision).id.partition(":")[2]
    return kept if kept.is_dir() else None


@app.command()
def report(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a Hub id, or an id of the ledger.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")] = Path(
        "report.html"
    ),
    traces: Annotated[int, typer.Option(min=0, help="Test prompts to show answered.")] = 3,
    home: Home = DEFAULT_HOME,
) -> None:
    """Scores, routing, cost and lineage on one page that opens offline, with the SQL of each."""
    import meteora
    from meteora.artifacts import ArtifactId
    from meteora.checkpoint import read_manifest
    from meteora.model import find_checkpoint
    from pipelines.page import check_writable, write_page
    from pipelines.questions import ask
    from pipelines.report import report_page
    from pipelines.report_examples import examples, traced
    from store.ledger import Ledger

    check_writable(output)
    home = home.expanduser().absolute()
    ledger, folder = Ledger(home), find_checkpoint(_checkpoint(checkpoint, home))
    asked = ask(ledger, ArtifactId(read_manifest(folder).router_id))
    drawn = []
    if chosen := examples(ledger, asked["outputs"], traces):
        model, tokenizer = meteora.load(folder, base_folder=_base_at_hand(folder, home))
        drawn = traced(model, tokenizer, chosen)
    write_page(output, report_page(asked, drawn))
    print(output)


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help='Such as "FROM leaderboard".')] = "SHOW TABLES",
    form: Annotated[show.Format | None, typer.Option("--format", help="Table by default.")] = None,
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
    show.answer(answer, form or (show.Format.table if sys.stdout.isatty() else show.Format.csv))


@app.command()
def verify(
    scores: Annotated[int, typer.Option(min=0, help="Scores to compute again, drawn anew.")] = 20,
    home: Home = DEFAULT_HOME,
) -> None:
    """Check blobs against their hashes, records against blobs, and scores against their outputs."""
    from pipelines.rejudge import rejudge
    from store.ledger import Ledger

    ledger = Ledger(home.expanduser().absolute())
    if show.findings(ledger.verify(), rejudge(ledger, scores)):
        raise typer.Exit(1)


@store_app.command()
def rebuild(home: Home = DEFAULT_HOME) -> None:
    """Make the index again from the records alone."""
    from store.ledger import Ledger

    ingested = Ledger(home.expanduser().absolute()).rebuild()
    if ingested.reason:
        raise MeteoraError(ingested.reason)
    print(f"{ingested.num_records} records in the index")


@store_app.command()
def pack(home: Home = DEFAULT_HOME) -> None:
    """Lay small records together in files of many; worth it from some thousands on."""
    from store.ledger import Ledger

    ledger = Ledger(home.expanduser().absolute())
    num_records = ledger.pack()
    ledger.ingest()
    print(f"{num_records} records packed")


@store_app.command()
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


@store_app.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """List the files that nothing refers to; remove them only with --yes."""
    from store.ledger import Ledger

    garbage = Ledger(home.expanduser().absolute()).gc(remove=yes)
    for name in (*garbage.blobs, *map(str, garbage.files)):
        print(name)
    done = "removed" if yes else "can be removed with --yes"
    say(f"{garbage.num_bytes / 1e6:.1f} MB {done}")


def main() -> None:
    """Run the command line; every refusal is one sentence and exit code 1."""
    try:
        app()
    except MeteoraError as error:
        say(f"[red]error:[/] {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
