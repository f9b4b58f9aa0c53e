"""The model card and the lineage statement of a checkpoint: text, and nothing is sent from here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from meteora.artifacts import COMMIT, short

if TYPE_CHECKING:
    from collections.abc import Mapping

    from meteora.checkpoint import Manifest
    from pipelines.summary import Summary

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"


def write_card(manifest: Manifest, summary: Summary, name: str) -> str:
    """The README.md of a checkpoint, with the metadata that the Hub understands."""
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
            *score_table(summary),
            "",
            *routing_lines(summary),
            *shortfall_lines(summary),
            "",
            f"Router: {_router(manifest)}. Ids: {_code(short(manifest.fused_id))},"
            f" {_code(short(manifest.router_id))}. Where everything came from, with hashes, stands"
            " in `lineage.json`.",
            "",
        ]
    )


def score_table(summary: Summary) -> list[str]:
    """Every score with its 95 % interval, as Markdown."""
    systems = summary.systems
    lines = [
        f"| task | n | {' | '.join(systems)} |",
        f"|-|-|{'-|' * len(systems)}",
    ]
    for task, row in summary.scores.items():
        cells = [
            interval(row[s].value, row[s].low, row[s].high) if s in row else "" for s in systems
        ]
        lines.append(f"| {task} | {row['fused'].num_samples} | {' | '.join(cells)} |")
    means = [summary.mean(system) for system in systems]
    shown = ["" if mean is None else f"**{mean:.3f}**" for mean in means]
    lines.append(f"| mean | | {' | '.join(shown)} |")
    harness = next(iter(summary.scores.values()))["fused"]
    lines += [
        "",
        f"Metric {harness.spec.metric}, greedy, zero-shot, seed {harness.spec.seed},"
        f" {harness.harness}; in brackets the 95 % interval (Wilson).",
    ]
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


def shortfall_lines(summary: Summary) -> list[str]:
    """Every task on which the fused model falls short of the oracle."""
    return [
        f"Falls short on {task}: {fused:.2f}, where its own adapter alone has {oracle:.2f}."
        for task, fused, oracle in summary.shortfalls()
    ]


def _router(manifest: Manifest) -> str:
    router = manifest.router
    how = (
        f", {manifest.gates['method']}d on {manifest.gates['num_tokens']:,} tokens"
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
    materials: list[dict[str, Any]] = [
        _material(manifest.base.repo_id, manifest.base.revision, "base")
    ]
    for expert in manifest.experts:
        material = _material(expert.source, expert.revision, f"expert {expert.name}")
        material["digest"]["sha256"] = expert.weights_sha256
        materials.append(material)
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": sha}} for name, sha in files.items()],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": "meteora-pipelines/run/v1",
                "externalParameters": {"recipe_sha256": recipe_sha256},
                "internalParameters": {
                    "fused_id": manifest.fused_id,
                    "router_id": manifest.router_id,
                    "gates": manifest.gates,
                },
                "resolvedDependencies": materials,
            },
            "runDetails": {"builder": {"id": "meteora-pipelines"}},
        },
    }
    return json.dumps(statement, indent=1) + "\n"


def _material(source: str, revision: str, name: str) -> dict[str, Any]:
    """A resolved dependency: a Hub commit, or a local file by its hash."""
    if COMMIT.fullmatch(revision):
        return {
            "name": name,
            "uri": f"hf://{source}@{revision}",
            "digest": {"gitCommit": revision},
        }
    return {"name": name, "uri": source, "digest": {"sha256": revision.removeprefix("sha256:")}}
