"""The text of a checkpoint's model card, and the sentences that the score table shares with it."""

from collections.abc import Sequence

from meteora.artifacts import RouterBuild, Score, short
from meteora.artifacts.specs import heads_in
from meteora.base.sources import GGUF, PATH
from meteora.checkpoint.manifest import Manifest
from meteora.untrusted.findings import MOST_NAMED, counted, inline_code, listed
from pipelines.hub.client import page_of
from pipelines.reports.hub_metadata import card_metadata, shots
from pipelines.reports.summary import Summary
from pipelines.scoring.metrics import METRICS

METHODS = {"calibrate": "calibrated", "joint": "trained by gradient descent"}
"""How the card says that the gates were made, by the method in a recipe."""
NAME_PLACEHOLDER = "FOLDER_OR_HUB_ID"
"""The model in the code of a card, until it is published under a name."""
MISSED = 0.5
"""An expert is missed by its router if it has less than this share of its own tokens."""
PAPER = "[MeteoRA](https://arxiv.org/abs/2405.13053)"


def write_card(manifest: Manifest, summary: Summary | None, name: str) -> str:
    """The README.md of a checkpoint, with the metadata that the Hub understands."""
    parts = [
        f"---\n{card_metadata(manifest, summary, name)}\n---",
        f"# {name}",
        f"{counted(len(manifest.experts), 'LoRA adapter')} in one model: at each linear layer a"
        f" router weighs them ({PAPER}). No one has to say which task a prompt belongs to.",
        "## Use",
        "\n".join(["```python", *usage_lines(manifest, summary), "```"]),
        "It needs the Python package `meteora-pipelines`, but not `trust_remote_code`. After"
        " `import meteora`, `AutoModelForCausalLM.from_pretrained` and `pipeline` of transformers"
        " take the same name. `with meteora.force_expert(model, NAME):` sends every token to one"
        " expert.",
        "## Made of",
        "\n".join(_sources(manifest)),
        "## Scores",
        *_measured(summary),
        "## Routing",
        " ".join(
            [
                f"Router: {_router(manifest)}.",
                *([*routing_lines(summary), *example_lines(summary.gates)] if summary else []),
            ]
        ),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(manifest)),
        "## Lineage",
        f"Stack {inline_code(short(manifest.fused_id))}, router"
        f" {inline_code(short(manifest.router_id))}. The sources of all parts, with commits and"
        " hashes, are in `lineage.json`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def usage_lines(manifest: Manifest, summary: Summary | None) -> list[str]:
    """A few lines of Python that load the model and generate an answer."""
    is_local = manifest.base.repo_id.startswith(PATH)
    base_folder = ', base_folder="FOLDER_OF_THE_BASE"' if is_local else ""
    lines = [
        "import meteora",
        "",
        f'model, tokenizer = meteora.load("{NAME_PLACEHOLDER}"{base_folder})',
    ]
    scores = [score for row in summary.scores.values() for score in row.values()] if summary else []
    is_plain = any(score.templated is False for score in scores)
    if not is_plain and manifest.gates.get("template") != "plain":
        asked = '"What is 12 plus 30?", max_new_tokens=40'
        return [*lines, f"print(meteora.generate(model, tokenizer, {asked}))"]
    lines.append('prompt = tokenizer("What is 12 plus 30?", return_tensors="pt")')
    answer = "model.generate(**prompt, max_new_tokens=40)[0]"
    return [*lines, f"print(tokenizer.decode({answer}, skip_special_tokens=True))"]


def _sources(manifest: Manifest) -> list[str]:
    base = manifest.base
    gguf = base.repo_id.startswith(GGUF)
    package = base.repo_id.removeprefix(GGUF).partition("/")[0]
    rows = [("the base", base.repo_id, base.revision, base.licence, "")]
    rows += [(e.name, e.source, e.revision, e.licence, e.r) for e in manifest.experts]
    cells = [
        (name, _linked(source), _linked(source, revision),
         inline_code(licence) if licence else "not stated", r)
        for name, source, revision, licence, r in rows
    ]  # fmt: skip
    return [
        *_table(("expert", "from", "commit", "licence", "r"), cells),
        "",
        "The base is not copied here: it is loaded at that commit, and another base is refused."
        + (f" It comes with the Python package {inline_code(package)}." if gguf else "")
        + (" It is a folder where this model was made." if base.repo_id.startswith(PATH) else "")
        + (
            f" It is loaded with linear layers of {base.quantise.removesuffix('bit')} bits by"
            " bitsandbytes, as it was when the gates were fitted and the scores measured."
            if base.quantise
            else ""
        ),
    ]


def _linked(source: str, revision: str = "") -> str:
    """A Hub id, or a commit of it, as a link; other sources as inline code."""
    page = page_of(source, revision)
    if not page:
        return inline_code(revision[:19] if revision else source)
    return f"[{inline_code(revision[:12] or source)}]({page})"


def _limits(manifest: Manifest) -> list[str]:
    router = manifest.router
    return [
        *stand_in_lines(router.stand_ins, router.stand_in),
        "The scores are for rows like those that the gates were fitted to; other prompts are not"
        " measured."
        if router.kind == "gate"
        else "Its router is not trained; the scores show how well it chooses.",
        "A prompt that is like no expert's task goes to the base alone, if the router notices it."
        if router.null
        else "A prompt that is like no expert's task still goes to some expert.",
        "The faults of the base and the adapters, and the terms of their licences, apply here too.",
        "It runs in transformers, with this package.",
        _servers(manifest),
    ]


def _servers(manifest: Manifest) -> str:
    """Which servers load the model, as `export_for_vllm` decides."""
    if not manifest.router.is_servable:
        why = "its router needs whole prompts"
    elif heads := heads_in(manifest.modules):
        why = f"experts change its head {inline_code(heads[0])}"
    else:
        return (
            "vLLM serves what `meteora export --for vllm` makes of it; other servers with model"
            " code of their own cannot load it."
        )
    return f"Servers with their own model code, such as vLLM, cannot load it: {why}."


def _measured(summary: Summary | None) -> list[str]:
    if summary is None:
        return ["Nobody has measured this model yet: an expert was added to it, or dropped."]
    parts = ["\n".join(score_table(summary))]
    for headings, rows, line in turn_tables(summary):
        parts += ["\n".join(_table(headings, rows)), line]
    return [*parts, "\n".join([*loss_lines(summary), *speed_lines(summary)])]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return [lines[0], "|-" * len(headings) + "|", *lines[1:]]


def score_table(summary: Summary) -> list[str]:
    """Every score with its 95 % interval, as Markdown."""
    if not summary.scores:
        return ["Nothing was measured: the recipe has no tests."]
    systems = summary.systems
    rows = []
    for task, row in summary.scores.items():
        fused, cells = row["fused"], [cell(summary, task, system) for system in systems]
        rows.append([task, fused.spec.metric, str(fused.num_samples), *cells])
    lines = _table(["task", "metric", "n", *systems], rows)
    means = [summary.mean(system) for system in systems]
    shown = ["" if mean is None else f"**{mean:.3f}**" for mean in means]
    if any(shown):
        lines.append(f"| mean of the experts' own tasks | | | {' | '.join(shown)} |")
    return [*lines, "", *method_lines(summary)]


def cell(summary: Summary, task: str, system: str, *, interval: bool = True) -> str:
    """One score, its interval if asked, the mark of `Summary.mark`; empty if not measured."""
    score = summary.scores[task].get(system)
    if score is None:
        return ""
    ends = f"[{score.low:.2f}, {score.high:.2f}]" if interval else ""
    return " ".join(filter(None, (f"{score.value:.2f}", ends, summary.mark(task, system))))


def turn_tables(
    summary: Summary, *, interval: bool = True
) -> list[tuple[list[str], list[list[str]], str]]:
    """For each task of conversations: headings, a row for each system, and a sentence."""
    found = []
    for task, row in summary.conversations.items():
        fused = row["fused"]
        count = len(fused.turns)
        places = [str(number) for number in range(2, count + 1)]
        headings = [task, "all turns", "turn 1", *places, "computed", "seconds"]
        rows = []
        for system, score in row.items():
            computed = sum(turn.computed_tokens for turn in score.turns)
            seconds = sum(turn.seconds for turn in score.turns)
            values = [f"{turn.value:.2f}" for turn in score.turns]
            shown = [system, cell(summary, task, system, interval=interval), *values]
            rows.append([*shown, f"{computed:,.0f}", f"{seconds:.2f}"])
        line = (
            f"{counted(fused.num_samples, 'conversation')} of {count} turns, each turn about"
            " another task; the model's own answers stay in the history. For intervals and tests a"
            " conversation is one row. The last two columns are sums over the turns: prompt tokens"
            " that no cache held, and seconds, answers included (a batch's time divided by its"
            " number of conversations)."
        )
        found.append((headings, rows, line))
    return found


def method_lines(summary: Summary) -> list[str]:
    """The settings of the scores in the table, in one or two sentences."""
    scores = [score for row in summary.scores.values() for score in row.values()]
    if not scores:
        return []
    methods = {"wilson": "Wilson's", "bootstrap": "by a bootstrap over rows (9,999 resamples)"}
    used = [text for name, text in methods.items() if any(s.interval == name for s in scores)]
    templated = {True: "in the base's chat template", False: "as plain text", None: ""}
    asked = {templated[score.templated] for score in scores} - {""}
    for system in {score.spec.system_prompt for score in scores} - {None}:
        asked.add(f"under the system prompt {system!r}" if system else "without a system prompt")
    specs = [row["fused"].spec for row in summary.scores.values()]
    given = {one.task: one.num_fewshot for one in specs if one.num_fewshot}  # metrics share it
    apart = " and ".join(f"{task} ({shots(n)})" for task, n in given.items())
    prompts = f"zero-shot but for {apart}" if apart else "zero-shot"
    harnesses = sorted({score.harness for score in scores})  # older scores are not measured again
    how = ", ".join(["greedy", prompts, *sorted(asked), *harnesses])
    answered = {  # once for all metrics of a task
        (score.spec.subject_id, score.spec.task): score for score in scores if _has_answers(score)
    }.values()
    total = sum(score.num_samples * max(1, len(score.turns)) for score in answered)
    cut, empty = sum(s.num_truncated for s in answered), sum(s.num_empty for s in answered)
    lines = [
        f"Settings: {how}; 95 % intervals are {' or '.join(used)}."
        + (
            f" Of {counted(total, 'answer')} {_were(cut)} cut at the greatest length and"
            f" {_were(empty)} empty; they count like the others."
            if total
            else ""
        )
    ]
    if summary.comparisons:
        lines.append(
            "+ marks a score that the fused model beats, - one that beats it, by a paired test on"
            " the same rows (McNemar's or sign flips; p < 0.05 after Holm's correction over the"
            " tasks). Without a mark the difference may be chance."
        )
    return lines


def _were(number: int) -> str:
    return f"{number:,} {'was' if number == 1 else 'were'}"


def _has_answers(score: Score) -> bool:
    """Whether a score rates written answers: not choices, and not a task of lm-eval's own."""
    metric = METRICS.get(score.spec.metric)
    return score.mean_prompt_tokens is not None and not (metric and metric.of_choices)


def routing_lines(summary: Summary) -> list[str]:
    """Sentences on the routing accuracy and on missed experts; empty if not measured."""
    if summary.routing is None:
        return []
    routing = summary.routing
    worst = min(routing.by_expert, key=lambda share: share.accuracy)
    lines = [
        f"Routing accuracy {routing.accuracy:.3f} over {routing.num_tokens:,} tokens of held-out"
        " rows, after the template's opening, in every routed layer; lowest for"
        f" {worst.expert} ({worst.accuracy:.3f})."
    ]
    if found := routing.abstention:
        lines.append(
            f"The base's probability tells the {found.num_nobodys} prompts of tasks without an"
            f" expert from the experts' own {found.num_own} with an AUROC of {found.auroc:.3f};"
            f" its mean is {found.nobodys_share:.2f} on the former,"
            f" {found.own_share:.2f} on the latter."
        )
    if missed := [share.expert for share in routing.by_expert if share.accuracy < MISSED]:
        is_gate = summary.gates.spec.options.kind == "gate"
        more = "Give more examples" if is_gate else "Give examples to a router of kind gate"
        lines.append(
            f"Most tokens of {listed(missed, MOST_NAMED)} go to other experts: the router cannot"
            f" tell them apart. {more}, or leave out one of two adapters for one task."
        )
    return lines


def example_lines(gates: RouterBuild) -> list[str]:
    """Sentences on the sources of examples that are no files of a recipe."""
    lines = []
    if gates.hub_examples:
        lines.append(f"Examples of the Hub: {', '.join(map(inline_code, gates.hub_examples))}.")
    if gates.card_examples:
        lines.append(
            "Examples of data sets that the adapters' own cards name:"
            f" {', '.join(map(inline_code, gates.card_examples))}."
        )
    if gates.example_licences:
        stated = ", ".join(map(inline_code, gates.example_licences))
        lines.append(f"Licences that these data sets state: {stated}.")
    if gates.spec.pool_id:
        lines.append(
            "Experts without examples have prompts without labels, or prompts that they wrote"
            f" ({inline_code(short(gates.spec.pool_id))}), with their own answers."
        )
    return lines


def stand_in_lines(names: Sequence[str], stand_in: str) -> list[str]:
    """One sentence that names the experts without examples, whose gates `stand_in` made, if any."""
    if not names:
        return []
    return [
        f"No examples were given for {listed([*names], MOST_NAMED)}: tokens are routed to them by"
        f" their weights ({stand_in}), which is less reliable than gates fitted to examples."
    ]


def loss_lines(summary: Summary) -> list[str]:
    """A sentence for every task on which the fused model is worse than a system beyond chance."""
    lines = []
    for task, other, one in summary.losses():
        row = summary.scores[task]
        lines.append(
            f"Worse than {other} on {task}: {row['fused'].value:.2f} against"
            f" {row[other].value:.2f}, n = {one.num_samples}, p = {one.p_holm:.3g}."
        )
    return lines


def speed_lines(summary: Summary) -> list[str]:
    """Sentences on the time and memory of routing; empty if not measured."""
    made = summary.speed
    if made is None:
        return []
    rates = " ".join(
        f"{rate.phase.capitalize()} {rate.fused_tokens_per_second:,.0f} tokens/s, the base"
        f" {rate.base_tokens_per_second:,.0f}: {rate.ratio:.2f} times its time"
        f" [{rate.low:.2f}, {rate.high:.2f}]."
        for rate in made.rates
    )
    working = ""
    if made.fused_working_bytes is not None and made.base_working_bytes is not None:
        working = (
            f"; a prefill takes {made.fused_working_bytes / 1e6:.1f} MB more, the base's"
            f" {made.base_working_bytes / 1e6:.1f} MB"
        )
    return [
        f"{rates} Batches of {made.spec.batch_size}, prompts of {made.spec.prompt_tokens} tokens,"
        f" {made.spec.new_tokens} new ones, {made.spec.rounds} rounds in turns, {made.device} with"
        f" {made.num_threads} threads, {made.dtype}.",
        f"In memory {made.added_bytes / 1e6:.1f} MB beside the base's"
        f" {made.base_bytes / 1e6:.1f} MB{working}. Its experts and gates take"
        f" {made.stored_bytes / 1e6:.1f} MB on disk.",
    ]


def _router(manifest: Manifest) -> str:
    router = manifest.router
    how = (
        f", {METHODS.get(manifest.gates['method'], 'made')}"
        f" on {manifest.gates['num_tokens']:,} tokens"
        if manifest.gates
        else ""
    )
    return f"{router.kind}, top_k {router.top_k}, temperature {router.temperature}{how}"
