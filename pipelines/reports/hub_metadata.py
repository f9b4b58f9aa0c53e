"""A checkpoint's facts about its model, in the two forms that the Hub reads.

The card's metadata is YAML on top of `README.md`; its `model-index` lists every score. The Hub's
leaderboards read `.eval_results/*.yaml`, where each entry names a dataset that the Hub keeps as a
benchmark and a task of its `eval.yaml`. Only the author of a recipe can say that a task is such a
benchmark, asked in the same way (`leaderboard:`); nothing is guessed from the source of the rows.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from meteora.artifacts import REPO_ID
from meteora.checkpoint.manifest import Manifest
from pipelines.evaluation.measurements import FUSED
from pipelines.recipe.benchmark import TaskSection
from pipelines.reports.summary import Summary

TAGS = ["meteora", "lora", "mixture-of-experts", "merge"]
LICENCES = {
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0",
    "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl",
    "lgpl-2.1", "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl",
    "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0",
    "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license",
    "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
    "llama4", "grok2-community", "gemma", "unknown",
}  # fmt: skip
"""The licences of the Hub besides `other`, in May 2026; it refuses a card with another one."""
NAME_OF_LICENCE = re.compile(r"[a-z0-9.-]+")


def card_metadata(manifest: Manifest, summary: Summary | None, name: str) -> str:
    """The YAML on top of a card, checked by huggingface_hub's own class."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=task.partition(":")[0],
            dataset_name=task.partition(":")[0],
            dataset_args={"num_samples": row[FUSED].num_samples},
            metric_type=row[FUSED].spec.metric,
            metric_value=round(row[FUSED].value, 4),
            metric_args={"interval_95": [round(row[FUSED].low, 4), round(row[FUSED].high, 4)]},
        )
        for task, row in (summary.scores if summary else {}).items()
    ]
    bases = hub_ids(manifest)
    data = ModelCardData(
        base_model=bases or None,
        base_model_relation="merge" if bases else None,  # the Hub's word for a model of several
        library_name="meteora-pipelines",
        pipeline_tag="text-generation",
        tags=TAGS,
        eval_results=results or None,
        model_name=name if results else None,
        **shared_licence(manifest),
    )
    return data.to_yaml()


def hub_ids(manifest: Manifest) -> list[str]:
    """The repositories of base and adapters on the Hub, each once, without subfolders."""
    sources = [manifest.base.repo_id, *(expert.source for expert in manifest.experts)]
    ids = ["/".join(source.split("/")[:2]) for source in sources if ":" not in source]
    return [name for name in dict.fromkeys(ids) if REPO_ID.fullmatch(name)]


def shared_licence(manifest: Manifest) -> dict[str, Any]:
    """The licence that all parts share; `other` if they differ, and the card lists them.

    The Hub names licences in small letters. A licence that it does not know is `other`, too.
    """
    stated = [manifest.base.licence, *(expert.licence for expert in manifest.experts)]
    if not any(stated):
        return {}
    name, *others = {licence.lower() for licence in stated}
    if not others and name in LICENCES:
        return {"license": name}
    named = not others and NAME_OF_LICENCE.fullmatch(name) and name != "other"
    return {"license": "other", "license_name": name if named else "of-its-base-and-adapters"}


def shots(num_fewshot: int) -> str:
    """The number of solved examples in each prompt, in words."""
    return f"{num_fewshot}-shot" if num_fewshot else "zero-shot"


def write_eval_results(tasks: Sequence[TaskSection], summary: Summary) -> str:
    """The text for leaderboards; empty if the recipe puts no task on a leaderboard.

    Shares of right rows become percent, as the leaderboards show them.
    """
    entries = []
    for task in tasks:
        score = summary.scores.get(task.called, {}).get(FUSED)
        if not task.leaderboard or score is None:
            continue
        owner, dataset, task_id = task.leaderboard.split("/")
        unit = 100 if score.interval == "wilson" else 1
        entries.append(
            EvalResultEntry(
                dataset_id=f"{owner}/{dataset}",
                task_id=task_id,
                value=round(unit * score.value, 4),
                notes=f"{score.spec.metric}, {shots(score.spec.num_fewshot)}, greedy,"
                f" {score.harness}; of {score.num_samples} rows, 95 % interval"
                f" {unit * score.low:.4g} to {unit * score.high:.4g}",
            )
        )
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""
