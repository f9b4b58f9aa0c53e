"""The model card and the lineage statement of a checkpoint: text, and nothing is sent from here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from meteora.artifacts import short
from pipelines.statement import dependency, statement

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meteora.checkpoint import Manifest
    from pipelines.summary import Summary

MADE = {"calibrate": "calibrated", "joint": "trained by gradient descent"}


def write_card(manifest: Manifest, summary: Summary | None, name: str) -> str:
    """The README.md of a checkpoint, with the metadata that the Hub understands.

    Args:
        summary: None for a checkpoint that nobody has measured
    """
    facts = {
        "library_name": "meteora-pipelines",
        "pipeline_tag": "text-generation",
        "tags": ["meteora", "lora", "mixture-of-experts"],
        # only what lies on the Hub may stand there
        "base_model": [
            source
            for source in (manifest.base.repo_id, *(e.source for e in manifest.experts))
            if ":" not in source
        ],
    }
    if not facts["base_model"]:
        del facts["base_model"]
    front = yaml.safe_dump(facts, sort_keys=False)
    return "\n".join(
        [
            f"---\n{front}---\n",
            f"# {name}",
            "",
            f"{len(manifest.experts)} LoRA adapters in one model: at each linear layer a router"
            " reads the token's hidden state and picks the adapter (MeteoRA, arXiv 2405.13053)."
            f" The base is {_code(manifest.base.repo_id)} at {_code(manifest.base.revision)}; it is"
            " referred to and not copied.",
            "",
            "```python",
            "import meteora",
            "",
            'model, tokenizer = meteora.load("THIS_FOLDER_OR_HUB_ID")',
            "```",
            "",
            "## Experts",
            "",
            "| expert | adapter | revision | licence | r |",
            "|-|-|-|-|-|",
            *(
                f"| {e.name} | {_code(e.source)} | {_code(e.revision[:19])} |"
                f" {e.licence or 'not stated'} | {e.r} |"
                for e in manifest.experts
            ),
            "",
            "## Scores",
            "",
            *_measured(summary),
            "",
            f"Router: {_router(manifest)}. Ids: {_code(short(manifest.fused_id))},"
            f" {_code(short(manifest.router_id))}. Where everything came from, with hashes, stands"
            " in `lineage.json`.",
            "",
        ]
    )


def _measured(summary: Summary | None) -> list[str]:
    if summary is None:
        return ["Nobody has measured this model yet: an expert was added to it, or dropped."]
    return [
        *score_table(summary),
        "",
        *routing_lines(summary),
        *loss_lines(summary),
        *speed_lines(summary),
    ]


def score_table(summary: Summary) -> list[str]:
    """Every score with its 95 % interval, as Markdown."""
    systems = summary.systems
    lines = [
        f"| task | metric | n | {' | '.join(systems)} |",
        f"|-|-|-|{'-|' * len(systems)}",
    ]
    for task, row in summary.scores.items():
        cells = [cell(summary, task, system) for system in systems]
        fused = row["fused"]
        lines.append(
            f"| {task} | {fused.spec.metric} | {fused.num_samples} | {' | '.join(cells)} |"
        )
    means = [summary.mean(system) for system in systems]
    shown = ["" if mean is None else f"**{mean:.3f}**" for mean in means]
    lines += [f"| mean of the experts' own tasks | | | {' | '.join(shown)} |", ""]
    return lines + how_measured(summary)


def cell(summary: Summary, task: str, system: str) -> str:
    """One score with its interval, marked where the fused model differs from it beyond chance."""
    score = summary.scores[task].get(system)
    if score is None:
        return ""
    shown = interval(score.value, score.low, score.high)
    return " ".join(filter(None, (shown, summary.mark(task, system))))


def how_measured(summary: Summary) -> list[str]:
    """What a reader needs to know to trust the table."""
    scores = [score for row in summary.scores.values() for score in row.values()]
    first = scores[0]
    methods = {"wilson": "Wilson", "bootstrap": "bootstrap over rows, 9,999 resamples"}
    used = [text for name, text in methods.items() if any(s.interval == name for s in scores)]
    templated = {True: "in the base's chat template", False: "as plain text", None: ""}
    asked = {templated[score.templated] for score in scores} - {""}
    how = ", ".join(["greedy", "zero-shot", *sorted(asked), first.harness])
    cut, empty = sum(s.num_truncated for s in scores), sum(s.num_empty for s in scores)
    lines = [
        f"Asked {how}; in brackets the 95 % interval ({'; '.join(used)}). Of all answers {cut:,}"
        f" were cut at the longest allowed and {empty:,} were empty; they count like any other."
    ]
    if summary.comparisons:
        lines.append(
            "+ marks what the fused model is better than, - what it is worse than, by a paired test"
            " on the same rows (McNemar's or sign flips; p < 0.05 after Holm's correction over the"
            " tasks). Where neither stands, the difference may be chance."
        )
    return lines


def interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def routing_lines(summary: Summary) -> list[str]:
    """How often tokens went to their own expert, in one sentence."""
    if summary.routing is None:
        return []
    routing = summary.routing
    worst = min(routing.by_expert, key=lambda share: share.accuracy)
    return [
        f"Routing accuracy {routing.accuracy:.3f} over {routing.num_tokens:,} tokens of held-out"
        " rows, after the template's opening, in every routed layer; lowest for"
        f" {worst.expert} ({worst.accuracy:.3f})."
    ]


def loss_lines(summary: Summary) -> list[str]:
    """Every task on which the fused model is worse than another system beyond chance."""
    lines = []
    for task, other, one in summary.losses():
        row = summary.scores[task]
        lines.append(
            f"Worse than {other} on {task}: {row['fused'].value:.2f} against"
            f" {row[other].value:.2f}, n = {one.num_samples}, p = {one.p_holm:.3g}."
        )
    return lines


def speed_lines(summary: Summary) -> list[str]:
    """What routing costs in time and memory."""
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
            f"; a prefill takes {made.fused_working_bytes / 1e6:.1f} MB beyond that, the base's"
            f" {made.base_working_bytes / 1e6:.1f} MB"
        )
    return [
        f"{rates} Batches of {made.spec.batch_size}, prompts of {made.spec.prompt_tokens} tokens,"
        f" {made.spec.new_tokens} new ones, {made.spec.rounds} rounds in turns, {made.device} with"
        f" {made.num_threads} threads, {made.dtype}.",
        f"In memory {made.added_bytes / 1e6:.1f} MB beside the base's"
        f" {made.base_bytes / 1e6:.1f} MB{working}; on disk {made.stored_bytes / 1e6:.1f} MB.",
    ]


def _router(manifest: Manifest) -> str:
    router = manifest.router
    how = (
        f", {MADE.get(manifest.gates['method'], 'made')} on {manifest.gates['num_tokens']:,} tokens"
        if manifest.gates
        else ""
    )
    return f"{router.kind}, top_k {router.top_k}, temperature {router.temperature}{how}"


def _code(text: str) -> str:
    """Text from strangers as inline code: no markup of theirs takes effect."""
    return f"`{text.replace('`', '').replace('|', '')}`"


def write_lineage(manifest: Manifest, files: Mapping[str, str], recipe_sha256: str) -> str:
    """An in-toto statement: what lies in the checkpoint, and what it was made of.

    Args:
        files: name to SHA-256 of the checkpoint's own files
    """
    base = manifest.base
    return statement(
        files,
        made_of=[
            dependency("base", base.repo_id, base.revision),
            *(
                dependency(
                    f"expert {expert.name}",
                    expert.source,
                    expert.revision,
                    sha256=expert.weights_sha256,
                    licence=expert.licence,
                )
                for expert in manifest.experts
            ),
        ],
        asked={"recipe_sha256": recipe_sha256},
        chosen={
            "fused_id": manifest.fused_id,
            "router_id": manifest.router_id,
            "gates": manifest.gates,
        },
    )
