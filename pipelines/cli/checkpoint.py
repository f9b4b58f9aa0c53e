"""Commands on a checkpoint: generate, publish, report, sign, attest, export; and `import`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated, Literal

import typer

from meteora.untrusted.findings import counted, for_terminal
from pipelines.cli import options
from pipelines.workspace.console import say

app = typer.Typer()


@app.command()
def generate(
    checkpoint: options.Checkpoint,
    prompt: Annotated[str, typer.Argument(help="The prompt; `-` reads standard input.")],
    expert: options.Expert = "",
    max_new_tokens: Annotated[int, options.count("Greatest length of the answer.")] = 256,
    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE.html",
            help="Show each token in its expert's colour, here and on a page. `-`: no page.",
        ),
    ] = "",
    as_json: options.AsJson = False,
    base: options.Base = None,
    token_for: options.TokenFor = options.NONE,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Answer a prompt with a fused model."""
    import meteora
    from meteora.model.chat import Chat
    from pipelines.admission import checkpoints
    from pipelines.cli import score_table
    from pipelines.reports.html import check_writable, write_page
    from pipelines.reports.trace import trace_page

    if trace not in {"", "-"}:
        check_writable(Path(trace))
    prompt = options.text_or_input(prompt)
    found = checkpoints.find(checkpoint, home, base, token_for, device=device, dtype=dtype)
    model, tokenizer = found.load()
    if trace or as_json:
        with meteora.force_expert(model, expert) if expert else nullcontext():
            traced = meteora.trace(model, tokenizer, prompt, max_new_tokens=max_new_tokens)
        said = list(traced.ids[traced.num_prompt :])
        answer = tokenizer.decode(said, skip_special_tokens=True)
        score_table.print_trace(traced, str(answer), as_json=as_json)
        if trace not in {"", "-"}:
            write_page(Path(trace), trace_page(traced, prompt))
        return
    Chat(model, tokenizer).answer(
        [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt,
        expert=expert,
        max_new_tokens=max_new_tokens,
        on_token=lambda token: print(for_terminal(token.text), end="", flush=True),
    )
    print()


@app.command()
def publish(
    checkpoint: options.OwnCheckpoint,
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub; created if missing.")],
    private: Annotated[
        bool, typer.Option("--private/--public", help="Who may see it.", show_default="private")
    ] = True,
    tag: Annotated[
        str, typer.Option(help="Its tag on the Hub. Default: a hash of its content.")
    ] = "",
    onto: Annotated[
        str, typer.Option(metavar="COMMIT", help="Replace this commit, which another machine made.")
    ] = "",
    allow_licence: Annotated[
        list[str],
        typer.Option(
            metavar="LICENCE",
            help="Also publish adapters with this licence; `none`: without a licence.",
        ),
    ] = options.NONE,
    base: options.Base = None,
    token_for: options.TokenFor = options.NONE,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Publish a checkpoint on the Hub in one commit, and check that it is the same model there.

    For that check it is loaded from here and from there, one after the other.

    The saved token goes to that repository, and with --token-for to the owner of the base.
    """
    from meteora.base.sources import PATH
    from meteora.checkpoint.manifest import read_manifest
    from pipelines.admission.checkpoints import FoundCheckpoint, find_base
    from pipelines.hub.client import hub_for
    from pipelines.publishing.publish import Destination, publish
    from pipelines.stages.adopt import is_recorded
    from pipelines.workspace.checkpoints import base_option, checkpoint_folder
    from pipelines.workspace.context import new_run_id
    from pipelines.workspace.machine import choose_device
    from store.ledger import Ledger

    choose_device(device)  # one that is not here is refused before anything is sent
    ledger = Ledger(home)
    folder = checkpoint_folder(checkpoint, home)
    # a publication of another one would be recorded under this id
    is_recorded(ledger, FoundCheckpoint(folder), read_manifest(folder))
    found = find_base(folder, home, base, token_for)
    found = replace(found, device=device, dtype=dtype)
    to = Destination(
        repo,
        hub_for(repo, [repo]),
        private=private,
        tag=tag,
        onto=onto,
        allow_licences=allow_licence,
    )
    made, recorded = publish(ledger, found, to, new_run_id())
    if recorded:
        ledger.ingest()
    else:
        say("the ledger under this home does not know the model, so nothing was recorded there")
    if as_json:
        shown = {"repo_id": made.repo_id, "revision": made.revision, "tag": made.tag}
        print(json.dumps(shown))
    else:
        print(f"{made.repo_id}@{made.revision} {made.tag}")
    base_model = read_manifest(found.folder).base.repo_id
    further = base_option(base_model, found.base_folder)
    further += f" --token-for {repo.partition('/')[0]}" if private else ""
    say(f"talk with it as others get it with `meteora chat {made.repo_id}{further}`")
    if base_model.startswith(PATH):
        say("its base is a local folder, so others need the same one", "note")


@app.command()
def report(
    checkpoint: options.Checkpoint,
    other: Annotated[
        str, typer.Argument(help="A second checkpoint: the report compares the two.")
    ] = "",
    output: Annotated[
        Path | None,
        options.output("The file to write. Default: report.html; comparison.html of two."),
    ] = None,
    traces: Annotated[
        int, options.count("How many test prompts to show with answers.", least=0)
    ] = 3,
    as_json: options.AsJson = False,
    base: options.Base = None,
    token_for: options.TokenFor = options.NONE,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Write one page with scores, routing, cost and lineage, each with its SQL; works offline.

    With two checkpoints it shows what differs: experts, router, and scores on the same rows. Then
    no model is loaded.
    """
    from meteora.artifacts import ArtifactId
    from meteora.checkpoint.manifest import read_manifest
    from pipelines.admission import checkpoints
    from pipelines.cli import score_table
    from pipelines.reports.examples import find_examples, trace_examples
    from pipelines.reports.html import check_writable, write_page
    from pipelines.reports.queries import run_queries
    from pipelines.reports.report import comparison_page, report_page
    from pipelines.reports.side_by_side import compare_checkpoints
    from pipelines.stages.adopt import as_recorded

    output = output or Path("comparison.html" if other else "report.html")
    check_writable(output)
    ledger = options.open_ledger(home)
    if other:
        folders = [checkpoints.find_folder(name, home, token_for) for name in (checkpoint, other)]
        a, b = (
            as_recorded(ledger, checkpoints.find_base(one, home, base, is_loaded=False)).folder
            for one in folders
        )
        compared = compare_checkpoints(ledger, a, b)
        write_page(output, comparison_page(compared))
        score_table.print_comparison(compared, output, as_json=as_json)
        say("open it in a browser; the tests are paired, over the rows that both were asked")
        return
    found = checkpoints.find(checkpoint, home, base, token_for, device=device, dtype=dtype)
    found = as_recorded(ledger, found)
    router_id = ArtifactId(read_manifest(found.folder).router_id)
    results = run_queries(ledger, router_id, checkpoint)
    drawn = []
    if chosen := find_examples(ledger, results["outputs"], traces):
        drawn = trace_examples(*found.load(), chosen)
    write_page(output, report_page(results, drawn))
    if as_json:
        rows = {name: result.rows for name, result in results.items()}
        print(json.dumps({"page": str(output), "results": rows}, default=str))
    else:
        print(output)
    say("open it in a browser; beside each result is the query that it comes from")


@app.command()
def sign(
    checkpoint: options.OwnCheckpoint,
    key: Annotated[Path, typer.Option(help="A private elliptic-curve key, PEM.")],
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Sign every file of a checkpoint; the signature is its file model.sig."""
    from pipelines.publishing.signing import sign as sign_folder
    from pipelines.workspace.checkpoints import checkpoint_folder

    folder = checkpoint_folder(checkpoint, home)
    print(sign_folder(folder, key))
    say(f"check it with `meteora verify {quote(str(folder))} --key PUBLIC`")


@app.command()
def attest(
    artifact: Annotated[str, typer.Argument(help="An id of the ledger, or its first characters.")],
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Print what an artifact was made of: an in-toto statement with SLSA provenance."""
    from pipelines.publishing.in_toto import attest as statement_on

    ledger = options.open_ledger(home)
    ledger.ingest(deadline_seconds=1.0)
    print(statement_on(ledger, ledger.resolve(artifact)), end="")


@app.command()
def export(
    checkpoint: options.Checkpoint,
    expert: Annotated[str, typer.Option(help="The expert's name; needed for PEFT.")] = "",
    target: Annotated[
        Literal["peft", "vllm", "llama.cpp"],
        typer.Option(
            "--for",
            help="`peft`: one expert as an adapter. `vllm`: a folder to serve. `llama.cpp`: experts"
            " as GGUF, without gates.",
        ),
    ] = "peft",
    output: Annotated[
        Path | None, options.output("A new folder. Default with --expert: its name.")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="For vLLM: copy base and checkpoint. Default: links.")
    ] = False,
    base: options.Base = None,
    token_for: options.TokenFor = options.NONE,
    home: options.Home = options.DEFAULT_HOME,
) -> None:
    """Write one expert as a PEFT adapter, a folder that vLLM serves, or experts as GGUF."""
    from meteora.checkpoint.export import export_expert
    from meteora.checkpoint.manifest import read_manifest
    from meteora.checkpoint.resolve import base_on_disk
    from pipelines.admission import checkpoints
    from pipelines.workspace.checkpoints import base_at_hand

    out = output or (Path(expert) if expert else None)
    if out is None:
        one = "" if target == "vllm" else ", or one expert with --expert"
        raise typer.BadParameter(f"name a new folder with -o{one}")
    if (target == "peft") != bool(expert) and target != "llama.cpp":
        raise typer.BadParameter("PEFT loads one adapter, --expert NAME; vLLM serves all of them")
    if copy and target != "vllm":
        raise typer.BadParameter("--copy is for vLLM's folder; other exports have no links")
    folder = checkpoints.find_folder(checkpoint, home, token_for)
    if target == "vllm":
        from meteora.serving.served_folder import export_for_vllm

        base = base_on_disk(read_manifest(folder), base or base_at_hand(folder, home))
        further = export_for_vllm(folder, base, out, copy=copy)
        say(f"serve it with `{' '.join(['vllm serve', quote(str(out)), further]).rstrip()}`")
    elif target == "llama.cpp":
        from meteora.checkpoint.gguf_export import export_gguf

        files = export_gguf(folder, out, expert, base or base_at_hand(folder, home))
        say(f"{counted(len(files), 'expert')}; `llama-server --lora FILE` loads one, without gates")
    else:
        if export_expert(folder, expert, out, _named_base(folder, expert, home)):
            say("its weights file is byte for byte the one that it was made of")
        say(f"load it with `peft.PeftModel.from_pretrained(base, {str(out)!r})`")
    print(out)


def _named_base(folder: Path, expert: str, home: Path) -> str:
    """The base that an expert's adapter names, from the ledger; empty if it is not recorded."""
    from meteora.artifacts import ArtifactId
    from meteora.checkpoint.manifest import read_manifest
    from store.ledger import Ledger

    entry = next((one for one in read_manifest(folder).experts if one.name == expert), None)
    if entry is None or not home.is_dir():
        return ""
    spec = Ledger(home).spec_of(ArtifactId(entry.adapter_id))
    return str(spec["base_model"]) if spec else ""


@app.command("import")
def import_adapters(
    folder: Annotated[Path, typer.Argument(help="A PEFT adapter, or a folder of them.")],
    output: Annotated[Path, options.output("The recipe to write.")] = Path("recipe.yaml"),
    base: Annotated[str, typer.Option(help="The base, if no config names it.")] = "",
    examples: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where their rows are: NAME/train.jsonl and NAME/test.jsonl, or NAME.train.jsonl"
            " and NAME.test.jsonl. Default: in each adapter's own folder.",
        ),
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Prompts without labels, {"prompt"} a line: adapters without rows get their'
            " examples from it.",
        ),
    ] = None,
    drop_overlaps: Annotated[
        bool, typer.Option("--drop-overlaps", help="Leave examples out that are also test rows.")
    ] = False,
) -> None:
    """Write a recipe for the adapters in a folder, ready for `meteora run`."""
    from pipelines.planning.overlaps import separate
    from pipelines.recipe.from_folder import adapters_below, write_recipe

    if below := adapters_below(folder):
        number, one = counted(len(below), "adapter"), below[0]
        say(f"{number} further down, such as {one}; import {one.parent} for it", "left out")
    beside = output.parent / f"{output.name}.examples"
    recipe = write_recipe(
        folder,
        output,
        base,
        examples,
        pool,
        lambda found: separate(found, beside, drop=drop_overlaps),
    )
    if pool and not recipe.gates.pool:
        say("every adapter has rows, so the pool is not used", "note")
    tested = sum(bool(one.test) for one in recipe.experts)
    say(
        f"{counted(len(recipe.experts), 'expert')} on {recipe.base}, {tested} with tests, router"
        f" {recipe.router.kind}; `meteora run {quote(str(output))} --dry-run` shows what it does"
    )
    print(output)
