"""Add a checkpoint that was made elsewhere to the ledger, so that its scores have a subject.

Its manifest cannot be checked, since it was not made here. So its experts and its gates get new
ids, computed from the bytes of its files. Under the ids in the manifest, a run of that recipe here
would mistake a stranger's files for its own results.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from meteora.artifacts import (
    WITH_GATES,
    AdapterModule,
    AdapterSpec,
    ArtifactId,
    BaseSpec,
    FusedSpec,
    MeteoraError,
    Reason,
    RouterSpec,
    file_sha256,
    short,
)
from meteora.base.sources import PATH, weights_sha256
from meteora.checkpoint.manifest import (
    EXPERTS,
    GATES,
    MANIFEST,
    STATISTICS,
    ExpertEntry,
    Manifest,
    read_manifest,
)
from meteora.checkpoint.sound_file import open_sound
from pipelines.admission.checkpoints import FoundCheckpoint
from pipelines.stages.build import build_base
from pipelines.stages.checkpoint import not_fitted, place_checkpoint, record_router, record_stack
from pipelines.stages.open_model import stack_in
from pipelines.workspace.bases import base_at
from pipelines.workspace.checkpoints import is_whole
from pipelines.workspace.console import say
from pipelines.workspace.context import RunContext, checkpoint_at
from pipelines.workspace.faults import require_space
from store.events import AdapterVerdict
from store.ledger import Ledger


@dataclass(frozen=True)
class Adoption:
    """A checkpoint that was made elsewhere, and its ids here."""

    found: FoundCheckpoint
    manifest: Manifest
    """Its own manifest, but with the ids that it has here."""
    adapters: tuple[AdapterSpec, ...]
    fused: FusedSpec
    router: RouterSpec


class ForeignCheckpointError(MeteoraError):
    """A checkpoint names the id of another one."""


def as_recorded(ledger: Ledger, found: FoundCheckpoint) -> FoundCheckpoint:
    """The copy of the checkpoint under this home if it was adopted; else the checkpoint itself.

    Raises:
        ForeignCheckpointError: The ledger has nothing of it, but another one under its id.
    """
    manifest = read_manifest(found.folder)
    if recorded_router(ledger, found, manifest) is None:
        router = plan_adoption(ledger, found, manifest).router
        folder = checkpoint_at(ledger.home, router.id)
        if (folder / MANIFEST).is_file():
            return replace(found, folder=folder)
        _refuse_foreign_id(ledger, found, manifest)
    return found


def is_recorded(ledger: Ledger, found: FoundCheckpoint, manifest: Manifest) -> bool:
    """Whether the ledger has this checkpoint.

    Raises:
        ForeignCheckpointError: It has the id that the checkpoint names, with other files or another
            base. What is recorded under that id is not about this checkpoint.
    """
    if recorded_router(ledger, found, manifest) is not None:
        return True
    _refuse_foreign_id(ledger, found, manifest)
    return False


def _refuse_foreign_id(ledger: Ledger, found: FoundCheckpoint, manifest: Manifest) -> None:
    """Refuse a checkpoint that is not recorded, if the ledger has the id that it names."""
    named = ArtifactId(manifest.router_id)
    if ledger.built(named) is None:
        return
    if found.base_folder and recorded_router(ledger, replace(found, base_folder=None), manifest):
        raise ForeignCheckpointError(
            f"{found.base_folder} has other files than the base that {short(named)} was made with;"
            " give that one with --base"
        )
    raise ForeignCheckpointError(
        f"{found.folder} names the id {short(named)}, which the ledger has with other files,"
        " routing or base; `meteora benchmark` takes it in under an id of its own, so use that one"
    )


def recorded_router(
    ledger: Ledger, found: FoundCheckpoint, manifest: Manifest
) -> RouterSpec | None:
    """The router of a checkpoint, if the ledger has it with this base, these experts and files.

    Without this comparison a manifest could name the ids of another model.
    """
    known = ledger.spec_of(ArtifactId(manifest.router_id))
    if known is None:
        return None
    router, fused = RouterSpec.from_dict(known), stack_in(manifest)
    files = _files(found.folder, manifest)
    specs = ledger.specs_of(fused.adapter_ids)
    known_specs = [specs[one] for one in fused.adapter_ids if one in specs]
    recorded = [_placed(AdapterSpec.from_dict(spec).modules) for spec in known_specs]
    stated = [_placed(_modules(manifest, e)) for e in range(len(fused.adapter_ids))]
    same = (
        (router.fused_id, router.options, recorded) == (fused.id, manifest.router, stated)
        and ledger.weights_of(fused.id) == files[EXPERTS]
        and ledger.weights_of(router.id) == files.get(GATES, files[EXPERTS])
        and _base_of(ledger, manifest, found.base_folder) == manifest.base.spec
    )
    return router if same else None


def plan_adoption(ledger: Ledger, found: FoundCheckpoint, manifest: Manifest) -> Adoption:
    """The ids of a checkpoint here; nothing is written."""
    files = _files(found.folder, manifest)
    adapters = tuple(
        AdapterSpec(
            weights_sha256=entry.weights_sha256,
            base_model="",
            use_rslora=False,
            dtype="",
            modules=_modules(manifest, e),
            found_in=f"{files[EXPERTS]}/{entry.name}",
        )
        for e, entry in enumerate(manifest.experts)
    )
    base = _base_of(ledger, manifest, found.base_folder)
    fused = FusedSpec(base.id, tuple(manifest.names), tuple(one.id for one in adapters))
    gates = manifest.gates if GATES in files else {}
    router = RouterSpec.of(
        fused.id,
        manifest.router,
        method=gates.get("method", ""),
        template="plain" if gates.get("template") == "plain" else "auto",
        found_in=files.get(GATES, ""),
    )
    adopted = replace(
        manifest,
        base=replace(manifest.base, repo_id=base.base_model, revision=base.base_revision),
        experts=tuple(
            replace(entry, adapter_id=spec.id)
            for entry, spec in zip(manifest.experts, adapters, strict=True)
        ),
        gates=gates | {"adopted_from": manifest.router_id} if gates else {},
        fused_id=fused.id,
        router_id=router.id,
        files=files,
    )
    return Adoption(found, adopted, adapters, fused, router)


def adopt(work: RunContext, adoption: Adoption) -> FoundCheckpoint:
    """Record the base, the experts and the router, and write the checkpoint under its new id.

    Args:
        work: Its recipe names the base, as a folder if it is at hand.

    Raises:
        CheckpointError: A file of tensors is missing, damaged, or not the one of its manifest.
        NoSpaceError: The disk has no room for them.
        HubError, SourceError: The base cannot be downloaded or found.
    """
    found, manifest, ledger = adoption.found, adoption.manifest, work.ledger
    built = build_base(work, manifest.base.spec)
    folder = work.checkpoint_folder(adoption.router.id)
    here = replace(found, folder=folder, base_folder=work.base_folder(built.spec))
    if is_whole(folder) and work.holds(adoption.router.id):
        return here
    paths = {name: found.folder / name for name in manifest.files}
    for name in paths:
        with open_sound(found.folder, name, manifest):
            pass
    num_bytes = sum(path.stat().st_size for path in paths.values())
    require_space(work.home, num_bytes, "a copy of this checkpoint")
    for path in paths.values():
        ledger.blobs.put(path)
    _record(work, adoption)
    place_checkpoint(work, manifest, " + ".join(manifest.names))
    say(
        f"{found.folder} was not made here: it is taken in as {short(adoption.router.id)}. Its"
        " files have the hashes that it names; how it was made is as it states",
        "note",
    )
    return here


def _record(work: RunContext, adoption: Adoption) -> None:
    """Record experts, stack and router, with the experts' sources as the manifest states them."""
    ledger, manifest, run_id = work.ledger, adoption.manifest, work.run_id
    experts = manifest.files[EXPERTS]
    for spec, entry in zip(adoption.adapters, manifest.experts, strict=True):
        if ledger.weights_of(spec.id) is None:
            ledger.record_adapter(_verdict(entry), run_id=run_id)
        ledger.record_artifact(spec, weights_sha256=spec.weights_sha256, run_id=run_id)
    record_stack(work, adoption.fused, experts)
    made = replace(
        not_fitted(work, adoption.router),
        weights_sha256=manifest.files.get(GATES, experts),
        num_tokens=manifest.gates.get("num_tokens", 0),
        statistics_sha256=manifest.files.get(STATISTICS, ""),
    )
    record_router(work, made)


def _verdict(entry: ExpertEntry) -> AdapterVerdict:
    parts = entry.source.split("/")
    own = 1 if entry.source.startswith(PATH) else 2
    message = "source, revision, licence and hash are as the checkpoint that it came in states them"
    return AdapterVerdict(
        name=entry.name,
        source=entry.source,
        repo_id="/".join(parts[:own]),
        revision=entry.revision,
        subfolder="/".join(parts[own:]),
        verdict="warn",
        reasons=(Reason("adopted", message),),
        licence=entry.licence,
        adapter_id=ArtifactId(entry.adapter_id),
    )


def _files(folder: Path, manifest: Manifest) -> dict[str, str]:
    """The SHA-256 of each file of tensors, by manifest or bytes; empty for a missing one."""
    names = [EXPERTS, *([GATES] if manifest.router.kind in WITH_GATES else [])]
    names += [STATISTICS] if (folder / STATISTICS).is_file() else []
    paths = {name: folder / name for name in names}
    return {
        name: manifest.files.get(name) or (file_sha256(path) if path.is_file() else "")
        for name, path in paths.items()
    }


def _modules(manifest: Manifest, e: int) -> tuple[AdapterModule, ...]:
    """The modules that expert `e` changes, sorted by path; alpha is scaling times rank."""
    return tuple(
        AdapterModule(
            path,
            entry.in_features,
            entry.out_features,
            entry.ranks[e],
            entry.scaling[e] * entry.ranks[e],
            entry.scaling[e],
        )
        for path, entry in sorted(manifest.modules.items())
        if entry.ranks[e]
    )


def _placed(modules: Sequence[AdapterModule]) -> list[tuple[str, int, float]]:
    """Path, rank and scaling of each module: the parts that a model computes with."""
    return [(one.path, one.r, one.scaling) for one in modules]


def _base_of(ledger: Ledger, manifest: Manifest, folder: Path | None) -> BaseSpec:
    """The base of the manifest; or, if the folder has other weights, the base in that folder."""
    spec = manifest.base.spec
    if folder is None or folder == base_at(ledger.home, spec.stored.id):
        return spec
    sha256 = weights_sha256(folder)
    if sha256 == ledger.weights_of(spec.stored.id) or spec.base_revision == f"sha256:{sha256}":
        return spec
    return BaseSpec(PATH + folder.absolute().name, f"sha256:{sha256}", spec.quantise)
