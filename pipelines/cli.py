"""The command line: data to stdout, progress and warnings to stderr.

Exit codes: 0 done, 1 refused or failed with a sentence, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import csv
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from meteora.artifacts import MeteoraError, short
from pipelines.environment import has_server, prepare
from pipelines.progress import say

if TYPE_CHECKING:
    from pipelines.plan import Plan
    from pipelines.workplace import Workplace
    from store.query import Answer

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


class Until(StrEnum):
    base = "base"
    check = "check"
    stack = "stack"
    gates = "gates"
    benchmark = "benchmark"


class Format(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's path, or the name of a shipped one.")],
    until: Annotated[Until, typer.Option(help="Stop after this stage.")] = Until.benchmark,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    home: Home = DEFAULT_HOME,
) -> None:
    """The main job: download, check, stack, fit gates, benchmark, record."""
    home = home.expanduser().absolute()
    work = _workplace(recipe, home, write=not dry_run)
    planned = _finished(work)
    if dry_run:
        _print_steps(work, planned)
        return
    seconds: dict[str, float] = {}
    if planned is None:
        if not has_server():
            say("starting a local Prefect server for this run; set PREFECT_API_URL to use yours")
        from pipelines import flows

        seconds = flows.run(work, until.value).seconds
        planned = _finished(work) if until is Until.benchmark else None
    else:
        say(f"{work.name}: everything is in the ledger already, nothing to do")
    if planned is not None:
        _print_summary(work, planned, seconds)


def _workplace(recipe: str, home: Path, *, write: bool) -> Workplace:
    from pipelines.recipe import Recipe, locate
    from pipelines.workplace import Workplace, new_run_id
    from store.ledger import Ledger

    path = locate(recipe)
    loaded = Recipe.load(path)
    if write:
        home.mkdir(parents=True, exist_ok=True)
    prepare(home)
    return Workplace(Ledger(home), loaded, path, new_run_id())


def _finished(work: Workplace) -> Plan | None:
    from pipelines.finished import finished

    return finished(work)


def _print_steps(work: Workplace, planned: Plan | None) -> None:
    """What a run would do: nothing is downloaded, made or written."""
    out = Console()
    if planned is not None:
        out.print(f"{work.name}: everything is in the ledger already")
        return
    recipe = work.recipe
    out.print(f"base       {recipe.base}")
    for expert in recipe.experts:
        out.print(f"expert     {expert.name}: {expert.adapter}")
    out.print(f"router     {recipe.router.kind}, top_k {recipe.router.top_k}")
    if recipe.router.kind == "gate":
        out.print(
            f"gates      {recipe.gates.method},"
            f" {recipe.gates.examples_per_expert} examples an expert at most"
        )
    systems = ", ".join(("fused", *recipe.benchmark.compare))
    tasks = [e.name for e in recipe.experts if e.test] + [t.name for t in recipe.benchmark.tasks]
    out.print(f"benchmark  {systems} on {', '.join(tasks)}, {recipe.benchmark.limit} rows at most")


def _print_summary(work: Workplace, planned: Plan, seconds: dict[str, float]) -> None:
    from pipelines.card import interval, routing_lines, shortfall_lines
    from pipelines.summary import summarise

    summary = summarise(work.ledger, planned, work.base_folder(planned.base))
    if summary is None:
        raise MeteoraError("the ledger lost a result while it was read; run again")
    out = Console()
    table = Table(title=f"{work.name}: exact match [95 % interval]")
    for heading in ("task", "n", *summary.systems):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for task, row in summary.scores.items():
        cells = [
            interval(row[s].value, row[s].low, row[s].high).replace("[", r"\[") if s in row else ""
            for s in summary.systems
        ]
        table.add_row(task, str(row["fused"].num_samples), *cells)
    means = [summary.mean(system) for system in summary.systems]
    table.add_section()
    table.add_row("mean", "", *("" if mean is None else f"{mean:.3f}" for mean in means))
    out.print(table)
    for line in (*routing_lines(summary), *shortfall_lines(summary)):
        out.print(line, soft_wrap=True)
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in summary.sizes.items())
    out.print(f"sizes: {sizes} (the base is referred to, not copied)", soft_wrap=True)
    if seconds:
        took = ", ".join(f"{stage} {spent:.0f} s" for stage, spent in seconds.items())
        out.print(f"times: {took}; in all {sum(seconds.values()):.0f} s", soft_wrap=True)
    out.print(f"checkpoint: {work.checkpoint_folder(planned.router.id)}", soft_wrap=True)
    out.print(f"recorded as {short(planned.router.id)}; try next:")
    question = "SELECT task, value, base_value, oracle_value FROM leaderboard WHERE router = 'gate'"
    out.print(f'  meteora sql "{question}"', soft_wrap=True)


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
    home: Home = DEFAULT_HOME,
) -> None:
    """Answer one prompt with a fused model."""
    from contextlib import nullcontext

    import meteora
    from meteora.generate import answer

    home = home.expanduser().absolute()
    folder = _checkpoint(checkpoint, home)
    model, tokenizer = meteora.load(folder, base_folder=_base_at_hand(folder, home))
    forced = meteora.force_expert(model, expert) if expert else nullcontext()
    with forced:
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
def sql(
    query: Annotated[str, typer.Argument(help='Such as "FROM leaderboard".')] = "SHOW TABLES",
    form: Annotated[Format | None, typer.Option("--format", help="Table by default.")] = None,
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
    _print_answer(answer, form or (Format.table if sys.stdout.isatty() else Format.csv))


def _print_answer(answer: Answer, form: Format) -> None:
    if form is Format.json:
        rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
        print(json.dumps(rows, indent=1, default=str))
    elif form is Format.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.columns)
        writer.writerows(answer.rows)
    else:
        table = Table(*answer.columns)
        for row in answer.rows:
            table.add_row(*(_cell(value) for value in row))
        Console().print(table)


def _cell(value: object) -> str:
    """A value as a table shows it; markup in a name is text, and takes no effect."""
    from rich.markup import escape

    return (
        f"{value:.3f}" if isinstance(value, float) else escape("" if value is None else str(value))
    )


@app.command()
def verify(home: Home = DEFAULT_HOME) -> None:
    """Check every blob against its hash, and every record against its blobs."""
    from store.ledger import Ledger

    found = Ledger(home.expanduser().absolute()).verify()
    for finding in found.findings:
        touched = (
            f"; it touches {', '.join(map(short, finding.touches))}" if finding.touches else ""
        )
        print(f"{finding.what} {finding.name}: {finding.problem}{touched}")
    print(
        f"{found.num_records} records and {found.num_blobs} blobs: {len(found.findings)} findings"
    )
    if found.findings:
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
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on")
        sys.exit(130)


if __name__ == "__main__":
    main()
