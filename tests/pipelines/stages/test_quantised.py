"""A recipe that asks for a quantised base: it is another base, fitted, measured and loaded so."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import meteora
from meteora.artifacts import ArtifactId
from meteora.base.sources import SourceError
from meteora.checkpoint.manifest import read_manifest
from meteora.fitting.sequences import TrainingError
from meteora.routing.layer import routed_layers
from pipelines.admission.candidate import Candidate
from pipelines.admission.checkpoints import FoundCheckpoint
from pipelines.reports.summary import summarise
from pipelines.stages import build, edit, measure, open_model
from pipelines.workspace.bases import verify_bases
from pipelines.workspace.context import RunContext
from tests.conftest import ATTENTION
from tests.pipelines.conftest import base_of, plan_of
from tests.pipelines.stages.test_spread import fit

pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")

STORED = {"4bit": torch.uint8, "8bit": torch.int8}


@pytest.fixture
def open_it(
    workplace: Callable[..., RunContext],
    build_base: Callable[[str], Path],
    build_adapter: Callable[..., Path],
    tmp_path: Path,
) -> Callable[..., RunContext]:
    """A recipe on a base that is wide enough for bitsandbytes."""
    base = build_base("llama_64")
    experts = [
        {
            "name": name,
            "adapter": f"path:{build_adapter(base, tmp_path / name, seed=seed, r=4, **lora)}",
            "examples": f"jsonl:{name}.train.jsonl",
            "test": f"jsonl:{name}.test.jsonl",
        }
        for seed, (name, lora) in enumerate(
            {
                "q_and_v": {"target_modules": ["q_proj", "v_proj"]},
                "attention": {"target_modules": list(ATTENTION)},
            }.items()
        )
    ]
    benchmark = {"limit": 3, "compare": ["base", "oracle", "linear"], "max_new_tokens": 4}

    def open_this(**changed: Any) -> RunContext:
        asked = {"base": f"path:{base}", "experts": experts, "benchmark": benchmark}
        return workplace(**(asked | changed))

    return open_this


@pytest.mark.parametrize("quantise", STORED)
def test_a_quantised_base_is_another_base_in_every_id_and_is_loaded_so_again(
    open_it: Callable[..., RunContext], quantise: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain = plan_of(open_it())
    work = open_it(quantise=quantise)
    planned, gates = fit(work)
    assert "MatMul8bitLt" not in caplog.text  # a line for each module and batch
    assert planned.base.stored == plain.base
    assert planned.base.parents == (plain.base.id,)
    assert planned.fused.id != plain.fused.id
    assert planned.router.id != plain.router.id
    ids = {one.spec.id for one in planned.measurements}
    assert ids.isdisjoint(one.spec.id for one in plain.measurements)
    assert work.base_folder(planned.base) == work.base_folder(plain.base)

    measure.measure(work, planned, gates)
    folder = build.write_checkpoint(work, planned, gates)
    manifest = read_manifest(folder)
    assert manifest.base.quantise == quantise
    assert open_model.stack_in(manifest).id == planned.fused.id
    assert f"linear layers of {quantise[0]} bits" in (folder / "README.md").read_text()
    work.ledger.ingest()
    found = work.ledger.query("SELECT descendant_id, ancestor_id FROM ancestors").rows
    assert (planned.router.id, plain.base.id) in found
    bases = work.ledger.query("SELECT id, quantise FROM base_models").rows
    assert dict(bases) == {plain.base.id: "", planned.base.id: quantise}
    summary = summarise(work.ledger, planned, work.base_folder(planned.base))
    assert summary is not None

    ids_in = torch.randint(3, 250, (2, 11))
    base = work.base_folder(planned.base)
    logits = []
    for device in (None, "cpu"):
        model, _ = meteora.load(folder, base_folder=base, device=device)
        assert {layer.weight.dtype for layer in routed_layers(model).values()} == {STORED[quantise]}
        with torch.inference_mode():
            logits.append(model(ids_in).logits)
    with open_model.opened(work, planned, gates=gates) as (model, _), torch.inference_mode():
        assert torch.equal(model(ids_in).logits, logits[0])
    assert torch.equal(*logits)
    if quantise == "4bit":  # another way that is asked for goes before
        model, _ = meteora.load(folder, base_folder=base, quantization_config=as_8_bit())
        weights = {layer.weight.dtype for layer in routed_layers(model).values()}
        assert weights == {torch.int8}


def test_an_expert_is_added_to_a_quantised_base_and_dropped_again(
    open_it: Callable[..., RunContext], build_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    work = open_it(quantise="4bit")
    planned, gates = fit(work)
    measure.measure(work, planned, gates)
    folder = build.write_checkpoint(work, planned, gates)
    base = work.base_folder(planned.base)
    adapter = build_adapter(base, tmp_path / "more", seed=7, r=2, target_modules=["q_proj"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i}{i}123", "response": "45{i}"}}\n' for i in range(8)))
    asked = Candidate("more", str(adapter))
    found = FoundCheckpoint(folder, base, device="cpu")
    larger = edit.add(work.ledger, found, asked, f"jsonl:{rows}")
    manifest = read_manifest(larger)
    assert manifest.base == read_manifest(folder).base
    assert work.ledger.built(ArtifactId(manifest.fused_id)) is not None
    assert work.ledger.spec_of(ArtifactId(manifest.base.spec.id)) == planned.base.to_dict()
    smaller = read_manifest(edit.drop(work.ledger, larger, "more"))
    assert open_model.stack_in(smaller) == planned.fused


def test_gates_of_several_experts_a_token_are_trained_on_a_quantised_base(
    open_it: Callable[..., RunContext],
) -> None:
    from bitsandbytes.functional import has_avx512bf16  # noqa: PLC0415  (only bases need it)

    joint = {"method": "joint", "steps": 2, "batch_size": 2, "start": "zeros"}
    asked: dict[str, Any] = {"router": {"top_k": 2}, "gates": joint}
    _, gates = fit(open_it(quantise="8bit", **asked))
    assert gates.num_tokens
    if has_avx512bf16():
        with pytest.raises(TrainingError, match="no gradient goes through linear layers of 4 bits"):
            fit(open_it(quantise="4bit", **asked))


def as_8_bit() -> Any:
    from transformers import BitsAndBytesConfig  # noqa: PLC0415  (only bases need it)

    return BitsAndBytesConfig(load_in_8bit=True)


def test_a_base_in_the_home_is_kept_once(
    open_it: Callable[..., RunContext], tmp_path: Path
) -> None:
    """And what was made of it in 4 bits is found where its files are damaged."""
    work = open_it(quantise="4bit")
    spec = base_of(work).spec
    kept = tmp_path / "home" / "bases" / spec.stored.id.partition(":")[2]
    shutil.copytree(work.base_folder(spec), kept)
    work.ledger.ingest()
    assert list(verify_bases(work.ledger)) == []
    (kept / "model.safetensors").write_bytes(b"damaged")
    (finding,) = verify_bases(work.ledger)
    assert {spec.id, spec.stored.id} <= set(finding.touches)


def test_a_base_that_is_quantised_already_is_not_quantised_again(
    open_it: Callable[..., RunContext], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415  (only bases need it)

    work = open_it()
    base = work.base_folder(plan_of(work).base)
    packed = tmp_path / "packed"
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=as_8_bit())
    model.save_pretrained(packed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, packed)
    with pytest.raises(SourceError, match="quantised already; use it as it is"):
        base_of(open_it(base=f"path:{packed}", quantise="4bit"))
