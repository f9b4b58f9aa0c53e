"""Add an expert to a checkpoint, or drop one; the bytes of all others stay the same.

The checkpoint may come from anywhere. It includes the statistics that its gates were fitted to, so
the recipe, the examples and the adapters of its other experts are not needed.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from meteora.adapters.tensors import Adapter
from meteora.artifacts import (
    AdapterSpec,
    ArtifactId,
    MeteoraError,
    RouterBuild,
    RouterSpec,
    canonical_sha256,
    file_sha256,
    short,
)
from meteora.artifacts.routers import ANSWER_START_SHARE
from meteora.base.loading import layers_on_disk, load_tokenizer
from meteora.base.shapes import fingerprint, shape_of
from meteora.checkpoint import edit, tensors
from meteora.checkpoint.manifest import (
    EXPERTS,
    GATES,
    MANIFEST,
    STATISTICS,
    Manifest,
    read_manifest,
)
from meteora.checkpoint.resolve import base_files, load_base
from meteora.checkpoint.stack import common_dtype
from meteora.checkpoint.tensors import Gates
from meteora.fitting import add_expert
from meteora.fitting.sequences import UNLABELLED
from meteora.fitting.statistics import read_statistics, write_statistics
from meteora.model.fused import check_base, insert_experts
from meteora.routing.gates import gates_of
from meteora.untrusted.findings import listed, shortened
from pipelines.admission.candidate import Admission, Candidate, resolve
from pipelines.admission.card_examples import licences_of_data_sets
from pipelines.admission.checkpoints import FoundCheckpoint
from pipelines.admission.sources import token_of_rows
from pipelines.data.labels import Labeller
from pipelines.data.row_sources import pin_source, read_rows, row_place
from pipelines.data.rows import Row, rows_sha256
from pipelines.evaluation.harness import room_of
from pipelines.planning.room import check_examples, with_room
from pipelines.recipe.gates import Composites, MixedSection, numbers_of, refuse_test_rows
from pipelines.recipe.recipe import Recipe, refuse_name
from pipelines.stages.adopt import is_recorded
from pipelines.stages.checkpoint import record_router, record_stack, replace_checkpoint, write_texts
from pipelines.stages.open_model import entry_of, stack_in, tokenizer_of_gates
from pipelines.workspace.checkpoints import is_whole
from pipelines.workspace.console import progress_bar, say
from pipelines.workspace.context import RunContext, new_run_id
from pipelines.workspace.machine import choose_device, device_name, is_too_large, memory_bytes
from pipelines.workspace.recorded_run import one_stage
from store.ledger import Ledger

EXAMPLES = 64
"""The most examples of a new expert; the same as a recipe's default."""
FEW_TOKENS = 1_000
"""Tokens of an expert in a fit; with fewer the others lose many of theirs to a new expert."""


class GrowthError(MeteoraError):
    """No expert can be added to or dropped from this checkpoint."""


@dataclass(frozen=True)
class EditedCheckpoint:
    """The new checkpoint: its tensors are in `folder`, its texts are not written yet."""

    folder: Path
    manifest: Manifest
    router: RouterBuild
    """Without the hashes of its files."""
    adapter: Adapter | None = None
    """The new expert's adapter; None if an expert is dropped."""


def add(ledger: Ledger, found: FoundCheckpoint, candidate: Candidate, examples: str) -> Path:
    """Make a checkpoint with one expert more; the given one stays as it is.

    Args:
        found: the given checkpoint; gates are fitted on its device
        candidate: the new expert; it is judged and recorded like the adapters of a recipe
        examples: of the new expert's task, as a recipe names them

    Returns:
        The folder of the new checkpoint under the ledger's home.

    Raises:
        AdapterError: the adapter is refused, it changes nothing, or the stack would not fit.
        HubError: the Hub does not deliver the adapter.
        GrowthError: the checkpoint has no gates of `calibrate` or not their statistics, a recipe
            could not have the name, or the device has no float64.
        ForeignCheckpointError: the checkpoint names the id of another one in the ledger.
        EditError: there is an expert of that name, or the sizes do not fit.
        TrainingError: the examples are too few.
    """
    if found.device.startswith("mps"):
        raise GrowthError("gates are fitted in 64 bits, which mps has not; say --device cpu")
    folder, device, dtype = found.folder, choose_device(found.device), found.dtype
    manifest = _read_editable(folder)
    is_ours = is_recorded(ledger, found, manifest)
    _check_texts(candidate.name, examples)
    edit.check_new_name(folder, manifest, candidate.name)
    _say_if_few(manifest, candidate.name)
    work = RunContext(ledger, candidate.recipe, folder / MANIFEST, new_run_id())
    # a mistyped adapter is told before rows and base are read
    admission = Admission(work, folder, manifest, candidate, resolve(work, candidate), device)
    composites = _composites(folder, manifest)
    if composites:
        _require_places(found, manifest)
    gates = tensors.read_gates(folder, manifest)
    rows, of_hub = _read_examples(examples, candidate)
    where = _map_of(manifest, found.base_folder, device)
    model, tokenizer = load_base(
        manifest, found.base_folder, dtype, download=found.download, options=where
    )
    check_base(manifest, fingerprint(model.config, tokenizer), folder)
    what, ran_on = f"add {candidate.name} to", device_name(device, dtype)
    with _scratch(work, manifest, what, ran_on) as scratch:
        expert = admission.read(model, tokenizer)
        larger = edit.add_expert(folder, expert.adapter, entry_of(expert), scratch / EXPERTS)
        insert_experts(model, scratch, larger)
        admission.admit(expert, model, tokenizer)
        crossed = bool(composites) and _was_crossed(ledger, manifest)
        asked: dict[str, Any] = {"composites": composites, "crossed": crossed, "dtype": dtype}
        spec = _router(manifest, larger, gates, rows_sha256(rows), **asked)
        if (out := _made_before(work, spec)) is not None:
            return out
        if (router := _given_again(ledger, spec, scratch)) is not None:
            edited = EditedCheckpoint(scratch, larger, router, expert.adapter)
            return _finish(work, manifest, edited, is_ours=is_ours)
        if not where:
            # plain nn.Module.to: the annotation of transformers' own hides it behind a decorator
            torch.nn.Module.to(model, device)
        tokenizer = tokenizer_of_gates(tokenizer, str(manifest.gates.get("template", "auto")))
        check_examples(
            {candidate.name: rows},
            lambda _name, number: row_place(examples, Path.cwd(), number),
            model.config,
            tokenizer,
        )
        place = len(manifest.names)
        nobody = place + 1 if larger.router.opening == "shared" else UNLABELLED
        labeller = Labeller(tokenizer, nobody=nobody)
        sequences = labeller.rows(rows, place)
        kinds = [(section.n, section.num_fewshot) for section in composites]
        lists = labeller.lists(rows, place, kinds, digits=not crossed)
        sequences += with_room(room_of(model.config), lists)
        layers = model.config.get_text_config().num_hidden_layers
        with progress_bar("fitting the gates", layers, "layers") as show:
            growth = add_expert.grow(
                model,
                sequences,
                gates,
                read_statistics(folder, manifest, gates),
                larger.router,
                progress=show,
            )
        tensors.write_gates(scratch / GATES, gates_of(model))
        write_statistics(scratch / STATISTICS, growth.statistics)
        router = RouterBuild(
            spec,
            "",
            growth.num_tokens,
            growth.heldout_accuracy,
            growth.wall_seconds,
            ran_on,
            **_data_set(of_hub, candidate),
        )
        edited = EditedCheckpoint(scratch, larger, router, expert.adapter)
        return _finish(work, manifest, edited, is_ours=is_ours)


def _say_if_few(manifest: Manifest, name: str) -> None:
    mean = manifest.gates["num_tokens"] // len(manifest.names)
    if mean < FEW_TOKENS:
        say(
            f"these gates were fitted to {mean} tokens of each expert in the mean; with so few the"
            f" others may lose many of theirs to {name}, so measure the result",
            "note",
        )


def _check_texts(name: str, examples: str) -> None:
    try:
        refuse_name(name)  # its task has this name, too
        refuse_test_rows(examples)
    except ValueError as error:
        raise GrowthError(str(error)) from None


def _read_examples(examples: str, candidate: Candidate) -> tuple[list[Row], str]:
    """The rows, and their source with its commit if it is a data set of the Hub; else empty."""
    token_of = token_of_rows(candidate.recipe.hub)
    of_hub = pin_source(examples, token_of)
    return read_rows(of_hub or examples, Path.cwd(), EXAMPLES, token_of), of_hub


def _data_set(of_hub: str, candidate: Candidate) -> dict[str, Any]:
    """What a `RouterBuild` notes on the new expert's data set of the Hub, if there is one."""
    if not of_hub:
        return {}
    licences = licences_of_data_sets([of_hub], token_of_rows(candidate.recipe.hub))
    stated = tuple(f"{name}: {licence}" for name, licence in licences.items())
    return {"hub_examples": (f"{candidate.name}: {of_hub}",), "example_licences": stated}


def drop(ledger: Ledger, folder: Path, name: str) -> Path:
    """Make a checkpoint with one expert less; no model is loaded, and the given one stays as it is.

    Raises:
        GrowthError: the checkpoint has no gates of `calibrate`, or not their statistics.
        ForeignCheckpointError: it names the id of another one in the ledger.
        UnknownExpertError: there is no such expert.
        EditError: it is the only one.
    """
    manifest = _read_editable(folder)
    is_ours = is_recorded(ledger, FoundCheckpoint(folder), manifest)
    gates = tensors.read_gates(folder, manifest)
    work = RunContext(ledger, Recipe.model_construct(), folder / MANIFEST, new_run_id())
    with _scratch(work, manifest, f"drop {name} from", "cpu") as scratch:
        stay = {*gates.follows.values()}
        if len(manifest.experts) > 2:  # an expert that is left alone needs no offsets
            stay |= {*gates.offsets}
        dtype = _dtype_without(ledger, manifest, name)
        smaller = edit.drop_expert(folder, name, scratch / EXPERTS, keep=stay, dtype=dtype)
        kept, statistics = add_expert.drop(
            gates,
            read_statistics(folder, manifest, gates),
            manifest.names.index(name),
            smaller.modules,
        )
        spec = _router(manifest, smaller, kept, "")
        if (out := _made_before(work, spec)) is not None:
            return out
        tensors.write_gates(scratch / GATES, kept)
        write_statistics(scratch / STATISTICS, statistics)
        router = RouterBuild(
            spec, "", num_tokens=0, heldout_accuracy=None, wall_seconds=0.0, device="cpu"
        )
        edited = EditedCheckpoint(scratch, smaller, router)
        return _finish(work, manifest, edited, is_ours=is_ours)


def _dtype_without(ledger: Ledger, manifest: Manifest, name: str) -> torch.dtype | None:
    """The dtype of a stack of the other experts in a recipe; None if it is not known.

    A dropped expert may have a wider dtype than the others. With this dtype the smaller stack is
    the one that a recipe would make.
    """
    recorded = ledger.weights_of(ArtifactId(manifest.fused_id))
    if recorded is None or recorded != manifest.files.get(EXPERTS):
        return None  # a stranger's stack may differ from the adapters that it names
    others = [ArtifactId(one.adapter_id) for one in manifest.experts if one.name != name]
    found = ledger.specs_of(others)
    specs = [AdapterSpec.from_dict(found[one]) for one in others if one in found]
    known = [spec for spec in specs if spec.dtype]  # an adopted expert has none
    return common_dtype(known) if others and len(known) == len(others) else None


def _map_of(manifest: Manifest, base_folder: Path | None, device: str) -> dict[str, Any]:
    """The options that place the base while it is loaded; empty if it is moved afterwards."""
    if manifest.base.quantise:  # quantised weights are made on their device
        return {"device_map": {"": device}}
    room = memory_bytes(device)
    if base_folder is None or not is_too_large(shape_of(base_folder).num_bytes, room):
        return {}
    say("the base is read from the disk one layer at a time")
    return {"device_map": layers_on_disk(base_folder, device)}


def _read_editable(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.router.stand_ins:
        raise GrowthError(
            f"{folder}: {listed(manifest.router.stand_ins)} had no examples, so nothing is kept"
            " of them; give them some in the recipe, and run that"
        )
    kind = manifest.router.kind
    if kind == "gate" and not manifest.gates:  # as in a model that was saved with other gates
        raise GrowthError(
            f"{folder / MANIFEST}: it does not say how its gates were made, so experts cannot be"
            " added or dropped; do it with the checkpoint that they come from"
        )
    if kind != "gate" or not (folder / STATISTICS).is_file():
        made = manifest.gates.get("method") if kind == "gate" else f"the router `{kind}`"
        raise GrowthError(
            f"{folder} has no gates with {STATISTICS}, so experts cannot be added or dropped; only"
            f" `method: calibrate` makes them (here: {made}): change its recipe and run that"
        )
    return manifest


@contextmanager
def _scratch(work: RunContext, manifest: Manifest, what: str, device: str) -> Generator[Path]:
    """A temporary folder on the store's disk, for a run of its own; `gc` does not run meanwhile.

    Args:
        what: the change of the checkpoint, such as `drop sums from`
    """
    name, stage = f"{what} {short(manifest.router_id)}", what.partition(" ")[0]
    with one_stage(work, name, canonical_sha256(name), device, stage):
        made = work.home / "runs" / work.run_id / "checkpoint"
        made.mkdir(parents=True)
        yield made


def _composites(folder: Path, manifest: Manifest) -> tuple[MixedSection, ...]:
    """The mixed prompts that the gates were fitted to."""
    found = manifest.gates.get("composites", ())
    try:
        return TypeAdapter(Composites).validate_python(found)
    except ValidationError as error:
        raise GrowthError(
            f"{folder / MANIFEST}: it says that the gates were fitted to prompts of"
            f" {shortened(found)} tasks; a list is needed, of whole numbers from 2 to 50 or of"
            ' {"n", "num_fewshot"}; download or build the checkpoint again'
        ) from error


def _require_places(found: FoundCheckpoint, manifest: Manifest) -> None:
    """Refuse a base whose tokenizer cannot show where the answers of a mixed prompt begin."""
    base = base_files(manifest, found.base_folder, found.download, weights=False)
    if not load_tokenizer(base).is_fast:
        raise GrowthError(
            f"{found.folder}: its gates were fitted to prompts of several tasks, and the base's"
            " tokenizer gives no places of its tokens in a text, so no expert can be added; take"
            " `composites` out of its recipe, give that the new expert, and run it"
        )


def _was_crossed(ledger: Ledger, manifest: Manifest) -> bool:
    """Whether the gates were fitted in halves; such a fit leaves out the digits in answers.

    Earlier versions wrote this into the ledger, and not into the manifest.
    """
    recorded = ledger.spec_of(ArtifactId(manifest.router_id)) or {}
    return bool(manifest.gates.get("crossed", recorded.get("crossed", False)))


def _router(
    before: Manifest,
    after: Manifest,
    gates: Gates,
    examples_sha256: str,
    *,
    composites: tuple[MixedSection, ...] = (),
    crossed: bool = False,
    dtype: str = "auto",
) -> RouterSpec:
    """The spec of the new router: the options of the old one, over other experts."""
    return RouterSpec.of(
        stack_in(after).id,
        after.router,
        method="calibrate",
        examples_sha256=examples_sha256,
        **numbers_of(composites),
        opening_share=ANSWER_START_SHARE if composites else 0.0,
        refined=bool(examples_sha256),
        bounded=bool(examples_sha256),
        crossed=crossed,
        offsets=bool(gates.offsets),
        grown_from=before.router_id,
        dtype="" if dtype == "auto" else dtype,  # equal ids have equal weights
    )


def _made_before(work: RunContext, spec: RouterSpec) -> Path | None:
    """The folder of this checkpoint if it was made before, perhaps on another device; else None."""
    folder = work.checkpoint_folder(spec.id)
    if work.ledger.built(spec.id) is None or not is_whole(folder):
        return None
    say("it is in the ledger already, nothing to do")
    return folder


def _given_again(ledger: Ledger, spec: RouterSpec, scratch: Path) -> RouterBuild | None:
    """Recorded gates and statistics, put into a folder; None if the store does not have both.

    Fitted again, on another device or by other threads, they would have other bytes.
    """
    router = ledger.built_as(RouterBuild, spec.id)
    if router is None or not all(sha256 in ledger.blobs for sha256 in router.blobs):
        return None
    for name, sha256 in zip((GATES, STATISTICS), router.blobs, strict=True):
        ledger.blobs.give(sha256, scratch / name)
    return router


def _finish(work: RunContext, before: Manifest, edited: EditedCheckpoint, *, is_ours: bool) -> Path:
    """Write the texts, record the checkpoint, and move its folder to its place."""
    router, num_tokens = edited.router.spec, before.gates["num_tokens"]
    dropped = 0 if edited.adapter else num_tokens // len(before.names)
    made: dict[str, Any] = {
        **before.gates,
        "num_tokens": num_tokens + edited.router.num_tokens - dropped,
        "grown_from": before.router_id,
        "grown_examples_sha256": router.examples_sha256,
        "grown_heldout_accuracy": edited.router.heldout_accuracy,
    }
    for key in ("hub_examples", "example_licences"):
        if new := getattr(edited.router, key):
            stated = before.gates.get(key)  # by a stranger, perhaps
            made[key] = [*(stated if isinstance(stated, list) else ()), *new]
    if _was_crossed(work.ledger, before):
        made["crossed"] = True
    names = (EXPERTS, GATES, STATISTICS)
    files = {name: file_sha256(edited.folder / name) for name in names}
    manifest = replace(
        edited.manifest, gates=made, fused_id=router.fused_id, router_id=router.id, files=files
    )
    write_texts(edited.folder, manifest, " + ".join(manifest.names))
    if is_ours:
        _record(work, manifest, edited)
    else:
        say("its parents are not in this ledger, so it is not recorded; only the folder is written")
    out = work.checkpoint_folder(router.id)
    replace_checkpoint(edited.folder, out)
    return out


def _record(work: RunContext, manifest: Manifest, edited: EditedCheckpoint) -> None:
    """Record adapter, stack and router, under the ids that they have in a recipe's run."""
    ledger, run_id = work.ledger, work.run_id
    for name, sha256 in manifest.files.items():  # blob and checkpoint share their bytes
        ledger.blobs.put(edited.folder / name, move=True)
        ledger.blobs.give(sha256, edited.folder / name)
    if edited.adapter is not None:
        spec = edited.adapter.spec
        ledger.record_artifact(spec, weights_sha256=spec.weights_sha256, run_id=run_id)
    experts, gates, statistics = manifest.files.values()
    record_stack(work, stack_in(manifest), experts)
    made = replace(edited.router, weights_sha256=gates, statistics_sha256=statistics)
    record_router(work, made)
    ledger.ingest()
