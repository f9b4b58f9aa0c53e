"""A checkpoint's folder with its texts, and the records of its stack and router."""

from pathlib import Path

from meteora.artifacts import ArtifactId, FusedCheckpoint, FusedSpec, RouterBuild, RouterSpec
from meteora.checkpoint.manifest import (
    CARD,
    CONFIG,
    CONFIG_TEXT,
    EVAL_RESULTS,
    LINEAGE,
    MANIFEST,
    Manifest,
)
from pipelines.publishing.in_toto import write_lineage
from pipelines.publishing.signing import is_signed
from pipelines.reports import card
from pipelines.reports.hub_metadata import write_eval_results
from pipelines.reports.summary import Summary
from pipelines.workspace.console import say
from pipelines.workspace.context import RunContext, put_in_place


def write_texts(
    folder: Path,
    manifest: Manifest,
    title: str,
    summary: Summary | None = None,
    recipe_sha256: str = "",
) -> None:
    """Write manifest, config, card and lineage into a folder that has the manifest's files.

    Args:
        title: of the card
        recipe_sha256: of the recipe that made the checkpoint; empty if there is none
    """
    texts = {
        MANIFEST: manifest.to_json(),
        CONFIG: CONFIG_TEXT,
        CARD: card.write_card(manifest, summary, title),
        LINEAGE: write_lineage(manifest, recipe_sha256),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def stays_as_signed(folder: Path) -> bool:
    """Whether a checkpoint is signed, so that its card stays as it is; says so."""
    signed = is_signed(folder)
    if signed:
        say(f"{folder} is signed, so its card stays as it is, without new scores", "note")
    return signed


def place_checkpoint(
    work: RunContext, manifest: Manifest, title: str, summary: Summary | None = None
) -> Path:
    """Make a checkpoint's folder of blobs of the ledger, whole or not at all, linked if possible.

    Arguments are those of `write_texts`.
    """
    results = write_eval_results(work.recipe.benchmark.tasks, summary) if summary else ""
    folder = work.checkpoint_folder(ArtifactId(manifest.router_id))
    with work.scratch() as scratch:
        made = scratch / folder.name
        made.mkdir()
        for name, sha256 in manifest.files.items():
            work.ledger.blobs.give(sha256, made / name)
        write_texts(made, manifest, title, summary, work.recipe_sha256)
        if results:
            (made / EVAL_RESULTS).parent.mkdir()
            (made / EVAL_RESULTS).write_text(results, encoding="utf-8")
        replace_checkpoint(made, folder)
    return folder


def replace_checkpoint(made: Path, folder: Path) -> None:
    """Put a finished checkpoint in its place; says if an older one there had a signature."""
    if is_signed(folder):
        say(f"{folder} was signed, and is made again without its signature: sign it", "note")
    put_in_place(made, folder)


def record_stack(work: RunContext, fused: FusedSpec, sha256: str) -> None:
    """Record stacked experts, whose file is a blob."""
    made = FusedCheckpoint(fused, sha256)
    work.ledger.record_artifact(
        fused, weights_sha256=sha256, built=made, blobs=[sha256], run_id=work.run_id
    )


def not_fitted(work: RunContext, spec: RouterSpec) -> RouterBuild:
    """A router to which nothing is fitted here; its weights are those of the recorded experts."""
    experts = str(work.ledger.weights_of(spec.fused_id))
    return RouterBuild(
        spec, experts, num_tokens=0, heldout_accuracy=None, wall_seconds=0.0, device=""
    )


def record_router(work: RunContext, made: RouterBuild) -> None:
    """Record a router, whose files are blobs."""
    sha256, blobs = made.weights_sha256, made.blobs
    work.ledger.record_artifact(
        made.spec, weights_sha256=sha256, built=made, blobs=blobs, run_id=work.run_id
    )
