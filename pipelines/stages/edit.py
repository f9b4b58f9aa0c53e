"""Take an expert into a checkpoint, or out of it; all others stay what they are, to the bit.

A checkpoint from anywhere will do: what its gates were fitted to is kept in it as statistics, and
neither the recipe nor the examples or adapters of its other experts are asked for.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from meteora.artifacts import (
    ArtifactId,
    BaseSpec,
    FusedCheckpoint,
    FusedSpec,
    MeteoraError,
    RouterBuild,
    RouterSpec,
)
from meteora.artifacts.routers import OPENING_SHARE
from meteora.base.sources import file_sha256
from meteora.checkpoint import edit, tensors
from meteora.checkpoint.manifest import (
    CARD,
    CONFIG,
    CONFIG_TEXT,
    EXPERTS,
    GATES,
    LINEAGE,
    MANIFEST,
    STATISTICS,
    read_manifest,
)
from meteora.checkpoint.resolve import load_base
from meteora.fitting import add_expert
from meteora.fitting.statistics import read_statistics, write_statistics
from meteora.model.fused import check_base, insert_experts
from meteora.routing.gates import gates_of
from pipelines.admission.candidate import Door
from pipelines.data.labels import label_lists, label_rows
from pipelines.data.row_sources import read_rows
from pipelines.data.rows import rows_sha256
from pipelines.publishing import lineage
from pipelines.recipe.gates import Composites
from pipelines.reports import card
from pipelines.stages.open_model import entry_of
from pipelines.workspace.console import bar, say
from pipelines.workspace.context import checkpoint_at, new_run_id, put_in_place

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from meteora.adapters.tensors import Adapter
    from meteora.checkpoint.manifest import Manifest
    from meteora.fitting.add_expert import Growth
    from pipelines.admission.candidate import Newcomer
    from store.ledger import Ledger

EXAMPLES = 64
"""Of a new expert: as many as a recipe takes of each, unless it says otherwise."""


class GrowthError(MeteoraError):
    """A checkpoint cannot be changed by an expert."""


@dataclass(frozen=True)
class Changed:
    """A checkpoint in the making: its files lie in `folder`, all but card, lineage and manifest."""

    run_id: str
    """Under which it is recorded."""
    folder: Path
    manifest: Manifest
    router: RouterSpec
    heldout_accuracy: float | None = None
    num_tokens: int = 0
    wall_seconds: float = 0.0
    adapter: Adapter | None = None
    """The new expert's."""


def add(
    ledger: Ledger,
    folder: Path,
    asked: Newcomer,
    examples: str,
    *,
    base_folder: Path | None = None,
) -> Path:
    """A checkpoint with one expert more, beside the one that is given.

    Args:
        folder: the checkpoint; it stays as it is
        asked: the new expert; it is judged as the adapters of a recipe are, and so recorded
        examples: of the new expert's task, as a recipe names them
        base_folder: where the base lies; without it the checkpoint's own reference is followed

    Returns:
        The folder of the new checkpoint under the ledger's home.

    Raises:
        AdapterError: the adapter is refused, it changes nothing, or the stack would not fit.
        HubError: it does not come from the Hub.
        GrowthError: the checkpoint has no gates in closed form, or nothing is kept of them.
        RestackError: there is an expert of that name, or the sizes do not fit.
        TrainingError: the examples are too few.
    """
    manifest = _growable(folder)
    composites = _composites(folder, manifest)
    rows = read_rows(examples, Path.cwd(), EXAMPLES)
    model, tokenizer = load_base(manifest, base_folder, "auto")
    check_base(manifest, model, tokenizer, folder)
    door = Door(ledger, new_run_id(), folder, manifest)
    expert = door.read(asked, model, tokenizer)
    with _changing(ledger, manifest) as scratch:
        larger = edit.add_expert(folder, expert.adapter, entry_of(expert), scratch / EXPERTS)
        insert_experts(model, scratch, larger)
        door.hear(asked, expert, model, tokenizer)
        place = len(manifest.names)
        sequences = label_rows(rows, place, tokenizer)
        sequences += label_lists(rows, place, tokenizer, sizes=composites, seed=0)
        with bar(
            "fitting the gates", model.config.get_text_config().num_hidden_layers, "layers"
        ) as advance:
            found: Growth = add_expert.grow(
                model,
                sequences,
                tensors.read_gates(folder, manifest),
                read_statistics(folder / STATISTICS),
                larger.router,
                progress=lambda _done, _total: advance(1),
            )
        tensors.write_gates(scratch / GATES, gates_of(model))
        write_statistics(scratch / STATISTICS, found.statistics)
        changed = Changed(
            door.run_id,
            scratch,
            larger,
            _router(manifest, larger, rows_sha256(rows), composites),
            found.heldout_accuracy,
            found.num_tokens,
            found.wall_seconds,
            expert.adapter,
        )
        return _settle(ledger, manifest, changed)


def drop(ledger: Ledger, folder: Path, name: str) -> Path:
    """A checkpoint with one expert less, beside the one that is given; no model is loaded.

    Raises:
        GrowthError: the checkpoint has no gates in closed form, or nothing is kept of them.
        RestackError: there is no such expert, or no other.
    """
    manifest = _growable(folder)
    gates = tensors.read_gates(folder, manifest)
    with _changing(ledger, manifest) as scratch:
        smaller = edit.drop_expert(folder, name, scratch / EXPERTS, keep={*gates.follows.values()})
        kept, statistics = add_expert.drop(
            gates,
            read_statistics(folder / STATISTICS),
            manifest.names.index(name),
            smaller.modules,
        )
        tensors.write_gates(scratch / GATES, kept)
        write_statistics(scratch / STATISTICS, statistics)
        changed = Changed(new_run_id(), scratch, smaller, _router(manifest, smaller, ""))
        return _settle(ledger, manifest, changed)


def _growable(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.router.stand_ins:
        raise GrowthError(
            f"{folder}: {', '.join(manifest.router.stand_ins)} had no examples, so nothing is kept"
            " of them; give them some in the recipe, and run that"
        )
    if not (folder / STATISTICS).is_file():
        made = manifest.gates.get("method") or f"no gates, its router is `{manifest.router.kind}`"
        raise GrowthError(
            f"{folder}: it has no {STATISTICS}, which gates with the method `calibrate`"
            f" come with (it has {made}); build it with them, or change the recipe and run that"
        )
    return manifest


@contextmanager
def _changing(ledger: Ledger, manifest: Manifest) -> Generator[Path]:
    """A folder on the store's own disk, while `gc` is kept at bay."""
    parent = ledger.home / "runs"
    with ledger.running(f"changing {manifest.router_id}"):
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as scratch:
            made = Path(scratch) / "checkpoint"
            made.mkdir()
            yield made


def _composites(folder: Path, manifest: Manifest) -> tuple[int, ...]:
    """How many tasks the prompts held that the gates were fitted to, beside plain examples."""
    found = manifest.gates.get("composites", ())
    try:
        return TypeAdapter(Composites).validate_python(found)
    except ValidationError as error:
        raise GrowthError(
            f"{folder / MANIFEST}: it says that the gates were fitted to prompts of"
            f" {found!r} tasks; a list of whole numbers from 2 to 50 is needed; download or build"
            " the checkpoint again"
        ) from error


def _router(
    before: Manifest, after: Manifest, examples_sha256: str, composites: tuple[int, ...] = ()
) -> RouterSpec:
    """What is asked: the same way to route, over other experts, made from what was there."""
    return RouterSpec.of(
        _fused(after).id,
        after.router,
        method="calibrate",
        examples_sha256=examples_sha256,
        composites=composites,
        opening_share=OPENING_SHARE if composites else 0.0,
        grown_from=before.router_id,
    )


def _fused(manifest: Manifest) -> FusedSpec:
    """The stack that a manifest describes."""
    base_id = BaseSpec(manifest.base.repo_id, manifest.base.revision).id
    adapter_ids = tuple(ArtifactId(entry.adapter_id) for entry in manifest.experts)
    return FusedSpec(base_id, tuple(manifest.names), adapter_ids)


def _settle(ledger: Ledger, before: Manifest, changed: Changed) -> Path:
    """Write what is left, move the folder to where checkpoints lie, and record it."""
    router = changed.router
    made: dict[str, Any] = {
        **before.gates,
        "grown_from": before.router_id,
        "grown_examples_sha256": router.examples_sha256,
        "grown_heldout_accuracy": changed.heldout_accuracy,
    }
    manifest = replace(changed.manifest, gates=made, fused_id=router.fused_id, router_id=router.id)
    names = (EXPERTS, GATES, STATISTICS)
    files = {name: file_sha256(changed.folder / name) for name in names}
    texts = {
        MANIFEST: manifest.to_json(),
        CONFIG: CONFIG_TEXT,
        CARD: card.write_card(manifest, None, " + ".join(manifest.names)),
        LINEAGE: lineage.write_lineage(manifest, files, ""),
    }
    for name, text in texts.items():
        (changed.folder / name).write_text(text)
    if ledger.built(ArtifactId(before.router_id)) is not None:
        _record(ledger, manifest, changed, files)
    else:
        say("its parents are not in this ledger, so it is not recorded; the folder is all there is")
    out = checkpoint_at(ledger.home, router.id)
    put_in_place(changed.folder, out)
    return out


def _record(ledger: Ledger, manifest: Manifest, changed: Changed, files: Mapping[str, str]) -> None:
    """Record new adapter, stack and router, under the ids that a recipe would give them."""
    run_id = changed.run_id
    for name in files:
        ledger.blobs.put(changed.folder / name)
    if changed.adapter is not None:
        spec = changed.adapter.spec
        ledger.record_artifact(spec, weights_sha256=spec.weights_sha256, run_id=run_id)
    fused = _fused(manifest)
    experts, gates, statistics = files.values()
    ledger.record_artifact(
        fused,
        weights_sha256=experts,
        built=FusedCheckpoint(fused, experts),
        blobs=[experts],
        run_id=run_id,
    )
    built = RouterBuild(
        changed.router,
        gates,
        changed.num_tokens,
        changed.heldout_accuracy,
        changed.wall_seconds,
        "cpu",
        statistics,
    )
    ledger.record_artifact(
        changed.router, weights_sha256=gates, built=built, blobs=built.blobs, run_id=run_id
    )
    ledger.ingest()
