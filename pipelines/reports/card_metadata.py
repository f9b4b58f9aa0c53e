"""What stands at the head of a model card, for the Hub and for whoever searches there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from meteora.artifacts import REPO_ID
from pipelines.evaluation.measurements import FUSED

if TYPE_CHECKING:
    from meteora.checkpoint.manifest import Manifest
    from pipelines.reports.summary import Summary

TAGS = ["meteora", "lora", "mixture-of-experts", "merge"]


def metadata(manifest: Manifest, summary: Summary | None, name: str) -> str:
    """YAML in the order in which it is written; huggingface_hub's own class checks it."""
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
        if FUSED in row
    ]
    bases = hub_ids(manifest)
    data = ModelCardData(
        base_model=bases or None,
        base_model_relation="merge" if bases else None,  # what the Hub calls one model of several
        library_name="meteora-pipelines",
        pipeline_tag="text-generation",
        tags=TAGS,
        eval_results=results or None,
        model_name=name if results else None,
        **licence(manifest),
    )
    return data.to_yaml()


def hub_ids(manifest: Manifest) -> list[str]:
    """The base and the adapters that lie on the Hub, each once; folders in them are left off."""
    sources = [manifest.base.repo_id, *(expert.source for expert in manifest.experts)]
    ids = ["/".join(source.split("/")[:2]) for source in sources if ":" not in source]
    return [name for name in dict.fromkeys(ids) if REPO_ID.fullmatch(name)]


def licence(manifest: Manifest) -> dict[str, Any]:
    """The one licence of all parts; `other` where they have several, which the card lists."""
    stated = [manifest.base.licence, *(expert.licence for expert in manifest.experts)]
    if not any(stated):
        return {}
    if len(set(stated)) == 1:
        return {"license": stated[0]}
    return {"license": "other", "license_name": "of-its-base-and-adapters"}
