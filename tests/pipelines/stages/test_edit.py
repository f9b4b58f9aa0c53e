"""An expert goes out of a checkpoint and comes back, by the command line, as a person would."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import meteora
from meteora.adapters import reader
from meteora.adapters.compatibility import stack_bytes
from meteora.artifacts import ArtifactId, RouterBuild, file_sha256
from meteora.artifacts.routers import ANSWER_START_SHARE
from meteora.checkpoint.manifest import (
    CARD,
    EXPERTS,
    GATES,
    LINEAGE,
    MANIFEST,
    STATISTICS,
    CheckpointError,
    Manifest,
    read_manifest,
)
from meteora.checkpoint.tensors import read_experts, read_gates
from meteora.fitting import add_expert
from meteora.routing.hooks import recorded_routes
from meteora.untrusted.findings import AdapterError
from pipelines.admission import candidate
from pipelines.admission.candidate import Candidate
from pipelines.admission.checkpoints import FoundCheckpoint
from pipelines.cli import app
from pipelines.data.rows import ExamplesError
from pipelines.hub.errors import HubFilesError
from pipelines.publishing.in_toto import attest
from pipelines.publishing.signing import SIGNATURE
from pipelines.stages import build, edit
from pipelines.stages.adopt import ForeignCheckpointError, as_recorded, recorded_router
from pipelines.stages.edit import GrowthError
from pipelines.workspace import machine
from pipelines.workspace.context import RunContext
from store.ledger import Ledger
from tests.conftest import ATTENTION, World
from tests.pipelines.admission.test_base_identity import profile_of
from tests.pipelines.admission.test_discover import adapter_repo
from tests.pipelines.admission.test_verdicts import altered
from tests.pipelines.cli.command_line import ask, done
from tests.pipelines.conftest import letters, result_of, run
from tests.pipelines.hub.hub_server import HubServer, Main, Repo, running_hub
from tests.pipelines.stages.test_spread import fit

pytestmark = pytest.mark.usefixtures("prefect_server")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of the first test that makes a checkpoint, for the others."""
    return tmp_path_factory.mktemp("kept") / "home"


@pytest.fixture
def made(workplace: Callable[..., RunContext], kept: Path) -> tuple[RunContext, Path]:
    work = workplace(benchmark={"limit": 1, "compare": [], "max_new_tokens": 1})
    if kept.exists():
        shutil.copytree(kept, work.home, dirs_exist_ok=True)
    else:
        run(work)
        shutil.copytree(work.home, kept)
    planned, _ = result_of(work)
    return work, work.checkpoint_folder(planned.router.id)


def slices(folder: Path, manifest: Manifest, name: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """One expert's numbers of every module that it targets."""
    e = manifest.names.index(name)
    found = {}
    for path, a, b in read_experts(folder, manifest):
        ranks = list(manifest.modules[path].ranks)
        if ranks[e]:
            found[path] = a.split(ranks)[e].clone(), b.split(ranks, dim=1)[e].clone()
    return found


def test_an_expert_goes_and_comes_back(
    made: tuple[RunContext, Path], recipe_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, folder = made
    before = read_manifest(folder)
    dropped = done("drop", folder, "attention", "--home", work.home)
    without = Path(dropped.stdout.strip())
    on_mps = FoundCheckpoint(without, device="mps")
    with pytest.raises(GrowthError, match="in 64 bits, which mps has not; say --device cpu"):
        edit.add(work.ledger, on_mps, Candidate("attention", ""), "")
    fewer = read_manifest(without)
    assert fewer.names == ["q_and_v"]
    assert fewer.gates["grown_from"] == before.router_id
    for old, new in zip(
        slices(folder, before, "q_and_v").values(),
        slices(without, fewer, "q_and_v").values(),
        strict=True,
    ):
        assert all(map(torch.equal, old, new))
    weights = read_gates(without, fewer).own
    for path, (weight, bias) in weights.items():
        assert torch.equal(weight, read_gates(folder, before).own[path][0][[0, 2]])
        assert len(bias) == 2  # the mean stays a choice

    source = f"jsonl:{recipe_folder / 'attention.train.jsonl'}"
    added = done(
        "add", without, "attention", recipe_folder / "attention", source,
        "--base", recipe_folder / "base", "--home", work.home,
    )  # fmt: skip
    again = Path(added.stdout.strip())
    gates = (again / GATES).stat()
    repeated = ask(
        "add", without, "attention", recipe_folder / "attention", source,
        "--base", recipe_folder / "base", "--home", work.home,
    )  # fmt: skip
    assert repeated.stdout == added.stdout, repeated.stderr
    assert "it is in the ledger already, nothing to do" in repeated.stderr
    assert "with so few the others may lose many of theirs to attention" in repeated.stderr
    assert (again / GATES).stat() == gates
    files = {path.name: path.read_bytes() for path in again.iterdir()}
    shutil.rmtree(again)
    with monkeypatch.context() as patch:
        patch.setattr(add_expert, "grow", None)  # other threads would give other bytes
        restored = ask(
            "add", without, "attention", recipe_folder / "attention", source,
            "--base", recipe_folder / "base", "--home", work.home,
        )  # fmt: skip
    assert restored.stdout == added.stdout, restored.stderr
    assert {path.name: path.read_bytes() for path in again.iterdir()} == files
    assert not work.ledger.verify().findings
    more = read_manifest(again)
    assert more.names == before.names
    assert more.fused_id == before.fused_id
    assert file_sha256(again / EXPERTS) == file_sha256(folder / EXPERTS)
    assert more.router_id not in {before.router_id, fewer.router_id}
    assert "Nobody has measured this model yet" in (again / CARD).read_text()

    model, tokenizer = meteora.load(again, base_folder=recipe_folder / "base")
    for e, name in enumerate(more.names):
        for row in letters(name, 1, 4):
            ids = tokenizer(row["prompt"], return_tensors="pt")
            with torch.no_grad(), recorded_routes(model) as routes:
                model(**ids)
            shares = [(experts[:, 0] == e).float().mean() for _, experts in routes.values()]
            assert torch.stack(shares).mean() > 0.8, name

    known = {row[0] for row in work.ledger.query("SELECT id FROM artifacts").rows}
    assert {before.router_id, fewer.router_id, more.router_id} <= known
    runs = work.ledger.query(
        "SELECT recipe_name, outcome, map_keys(stage_seconds), id FROM runs"
        " JOIN artifacts USING (run_id) WHERE kind = 'router' ORDER BY started_at DESC LIMIT 2"
    ).rows
    assert runs == [
        (f"add attention to {fewer.router_id[:19]}", "ok", ["add"], more.router_id),
        (f"drop attention from {before.router_id[:19]}", "ok", ["drop"], fewer.router_id),
    ]
    assert not work.ledger.verify().findings


def test_the_tokens_of_a_fit_are_those_of_the_experts_that_are_there(
    made: tuple[RunContext, Path], recipe_folder: Path
) -> None:
    """Or the note on few tokens would be of another number of experts."""
    work, folder = made
    without = edit.drop(work.ledger, folder, "attention")
    found = FoundCheckpoint(without, recipe_folder / "base", device="cpu")
    rows = f"jsonl:{recipe_folder / 'attention.train.jsonl'}"
    asked = Candidate("attention", str(recipe_folder / "attention"))
    again = read_manifest(edit.add(work.ledger, found, asked, rows))
    before, fewer, after = (
        one.gates["num_tokens"] for one in (read_manifest(folder), read_manifest(without), again)
    )
    assert fewer == before - before // 2
    added = work.ledger.built(ArtifactId(again.router_id)) or {}
    assert after == fewer + added["num_tokens"] > fewer


def test_what_is_not_recorded_is_measured_by_its_folder(
    made: tuple[RunContext, Path], tmp_path: Path
) -> None:
    """A home that does not know a checkpoint's parents has no id of it, either."""
    said = ask("drop", made[1], "attention", "--home", tmp_path / "other")
    assert "it is not recorded; only the folder is written" in said.stderr
    assert f"`meteora benchmark {said.stdout.strip()} --base FOLDER`" in said.stderr


def test_an_expert_that_was_dropped_before_is_not_dropped_again(
    made: tuple[RunContext, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The card may have scores since, and the folder a signature; what it lacks comes back."""
    work, folder = made
    without = edit.drop(work.ledger, folder, "attention")
    for name, sha256 in read_manifest(without).files.items():
        assert (without / name).samefile(work.ledger.blobs.path_of(sha256)), "on the disk once"
    (without / CARD).write_text("measured")
    assert "nothing to do" not in capsys.readouterr().err
    assert edit.drop(work.ledger, folder, "attention") == without
    assert "it is in the ledger already, nothing to do" in capsys.readouterr().err
    assert (without / CARD).read_text() == "measured"
    (without / SIGNATURE).write_text("{}")
    for name in (EXPERTS, CARD):
        (without / name).unlink()
        assert edit.drop(work.ledger, folder, "attention") == without
        assert (without / name).is_file()
    assert capsys.readouterr().err.count("is made again without its signature: sign it") == 1


def test_who_joins_comes_through_the_door_of_a_recipe(
    made: tuple[RunContext, Path],
    recipe_folder: Path,
    world: World,
    build_base: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    hub_here: None,  # noqa: ARG001
) -> None:
    """Each refusal is recorded with its reason, and leaves no checkpoint and no scratch."""
    work, folder = made
    plain = world.adapters["all_seven"]
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_bytes((plain / "adapter_config.json").read_bytes())
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x02")
    rows = recipe_folder / "q_and_v.train.jsonl"
    before = [*work.ledger.home.joinpath("checkpoints").iterdir()]

    def join(name: str, adapter: object, **more: Any) -> Path:
        return edit.add(
            work.ledger,
            FoundCheckpoint(folder, recipe_folder / "base", device="cpu"),
            Candidate(name, str(adapter), **more),
            f"jsonl:{rows}",
        )

    with running_hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        server.repos["a/dora"] = adapter_repo(plain, use_dora=True)
        server.repos["a/stranger"] = adapter_repo(plain, base_model_name_or_path="org/other")
        server.repos["org/other"] = profile_of(build_base("llama_64"))
        loud = altered(plain, tmp_path / "loud", 100.0)
        server.repos["a/copy"] = adapter_repo(loud, base_model_name_or_path="org/same")
        server.repos["org/same"] = profile_of(world.base)
        refused = {
            "dora": "a/dora",
            "other_base": "a/stranger",
            "no_effect": altered(plain, tmp_path / "whisper", 1e-9),
            "pickle": pickled,
        }
        for code, adapter in refused.items():
            with pytest.raises(AdapterError, match=rf"\[{code}\]"):
                join(code, adapter)
        with pytest.raises(AdapterError, match="q_and_v and again are the same adapter"):
            join("again", world.adapters["q_and_v"])
        server.repos["a/bin"] = Repo({"adapter_model.bin": b""}, refs={"main": "a" * 40})
        with pytest.raises(HubFilesError, match="pickle"):
            join("hub", "a/bin")
        assert not any("a/dora" in p and ".safetensors" in p for _, p, _ in server.requests)
        assert [*work.ledger.home.joinpath("checkpoints").iterdir()] == before
        assert not [*work.home.joinpath("runs").iterdir()]
        work.ledger.ingest()
        ends = dict(work.ledger.query("SELECT recipe_name, outcome FROM runs").rows)
        router = read_manifest(folder).router_id[:19]
        assert {ends[f"add {code} to {router}"] for code in refused} == {"refused"}
        assert ends[f"add hub to {router}"] == "failed"
        out = join("copy", "a/copy")

    assert read_manifest(out).names == ["q_and_v", "attention", "copy"]
    # the others have no MLP: its modules follow the attention's gate, down_proj with another width
    model, tokenizer = meteora.load(out, base_folder=recipe_folder / "base")
    meteora.generate(model, tokenizer, "hello", max_new_tokens=2)
    work.ledger.ingest()
    found = work.ledger.query("SELECT name, verdict, codes, licence, adapter_id FROM adapters").rows
    verdicts = {name: (verdict, set(codes)) for name, verdict, codes, _, _ in found}
    for code in [*refused, "hub"]:
        assert verdicts[code][0] == "refuse"
        assert code in verdicts[code][1]
    assert "again" not in verdicts  # what is there already stays accepted
    assert verdicts["copy"] == ("warn", {"base_alias", "large_update"})
    (copy,) = (row for row in found if row[0] == "copy")
    assert copy[3:] == ("mit", read_manifest(out).experts[-1].adapter_id)
    assert "note: copy: what it adds to" in capfd.readouterr().err


def test_who_would_not_fit_in_memory_is_refused_before_any_weights_are_written(
    made: tuple[RunContext, Path],
    recipe_folder: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By the measure of a run's check: the stacked factors, against all memory of the device."""
    work, folder = made

    def written() -> list[Path]:
        """All but the records, of which a refusal has some."""
        parts = ("adapters", "blobs", "checkpoints", "runs")
        return sorted(path for part in parts for path in (work.home / part).rglob("*"))

    before = written()
    adapter = world.adapters["all_seven"]
    rows = recipe_folder / "q_and_v.train.jsonl"
    command = ["meteora", "add", folder, "third", adapter, f"jsonl:{rows}"]
    command += ["--base", recipe_folder / "base", "--home", work.home]
    three = [world.adapters["q_and_v"], world.adapters["attention"], adapter]
    needs = stack_bytes([reader.read(path).spec for path in three])
    monkeypatch.setattr("sys.argv", [str(argument) for argument in command])
    monkeypatch.setattr(candidate, "memory_bytes", lambda _device: needs - 1)
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code == 1
    said = " ".join(capfd.readouterr().err.split())
    assert f"the stack of 3 experts has {needs / 1e6:,.0f} MB" in said
    assert said.endswith("[memory]")
    assert "`meteora drop`" in said
    assert written() == before
    outcome, reason = work.ledger.query("SELECT outcome, reason FROM runs LIMIT 1").rows[0]
    assert outcome == "refused"
    assert reason.endswith("[memory]")

    monkeypatch.setattr(candidate, "memory_bytes", lambda _device: needs)
    asked = Candidate("third", str(adapter))
    found = FoundCheckpoint(folder, recipe_folder / "base", device="cpu")
    out = edit.add(work.ledger, found, asked, f"jsonl:{rows}")
    assert sum(map(tensor_bytes, read_experts(out, read_manifest(out)))) == needs
    meteora.load(out, base_folder=recipe_folder / "base")


def test_an_expert_is_added_to_a_base_that_does_not_fit_with_the_same_gates(
    made: tuple[RunContext, Path],
    recipe_folder: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work, folder = made
    rows = f"jsonl:{recipe_folder / 'q_and_v.train.jsonl'}"
    on_disk: list[set[str]] = []
    dtypes: list[torch.dtype] = []
    own = add_expert.grow

    def watched(model: Any, *given: Any, **more: Any) -> Any:
        dtypes.append(model.dtype)
        on_disk.append({path for path, tensor in model.named_parameters() if tensor.is_meta})
        return own(model, *given, **more)

    monkeypatch.setattr(add_expert, "grow", watched)
    monkeypatch.setattr(edit, "_given_again", lambda *_: None)  # it is fitted each time
    made_of = []
    base, asked = recipe_folder / "base", Candidate("third", str(world.adapters["all_seven"]))
    for most, dtype in ((0.6, "auto"), (0, "auto"), (0, "bfloat16")):
        monkeypatch.setattr(machine, "MOST", most)
        found = FoundCheckpoint(folder, base, device="cpu", dtype=dtype)
        out = edit.add(work.ledger, found, asked, rows)
        made_of.append([file_sha256(out / name) for name in (EXPERTS, GATES, STATISTICS)])
        shutil.rmtree(out)  # or it would be found, and not made again
    assert made_of[0] == made_of[1]
    assert made_of[2][0] == made_of[1][0]
    assert made_of[2][1] != made_of[1][1]  # other gates, and so another id
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]
    assert on_disk[0] == set()
    for paths in on_disk[1:]:
        assert any("layers.1." in path for path in paths)


def tensor_bytes(factors: tuple[str, torch.Tensor, torch.Tensor]) -> int:
    _, a, b = factors
    return a.nbytes + b.nbytes


def test_who_joins_a_fit_with_composites_learns_from_lists_of_its_own(
    made: tuple[RunContext, Path], recipe_folder: Path, world: World, tmp_path: Path
) -> None:
    work, folder = made
    body = json.loads((folder / MANIFEST).read_text())
    assert "composites" not in body["gates"]

    def joined(composites: object, **fit: bool) -> RouterBuild:
        copy = tmp_path / f"{composites}{fit}"
        shutil.copytree(folder, copy)
        gates = body["gates"] if composites is None else body["gates"] | {"composites": composites}
        gates |= fit
        (copy / MANIFEST).write_text(json.dumps(body | {"gates": gates}))
        asked = Candidate("third", str(world.adapters["all_seven"]))
        rows = f"jsonl:{recipe_folder / 'attention.train.jsonl'}"
        found = FoundCheckpoint(copy, recipe_folder / "base", device="cpu")
        out = edit.add(work.ledger, found, asked, rows)
        manifest = read_manifest(out)
        assert manifest.gates.get("composites") == composites
        offsets = read_gates(out, manifest).offsets
        assert any(rows[manifest.names.index("third")].any() for rows in offsets.values())
        return RouterBuild.from_dict(work.ledger.built(ArtifactId(manifest.router_id)) or {})

    alone, with_lists = joined(None), joined([2, 3])
    shown = joined([2, {"n": 3, "num_fewshot": 1}])
    assert (shown.spec.composites, shown.spec.solved) == ((2, 3), (0, 1))
    assert shown.num_tokens > with_lists.num_tokens
    # without the digits of the answers' numbers, as the fit in halves left them out
    in_halves = joined([2, 3], crossed=True)
    assert in_halves.spec == dataclasses.replace(with_lists.spec, crossed=True)
    assert in_halves.num_tokens < with_lists.num_tokens
    assert alone.spec.offsets
    assert (alone.spec.composites, alone.spec.opening_share) == ((), 0.0)
    assert (with_lists.spec.composites, with_lists.spec.opening_share) == (
        (2, 3),
        ANSWER_START_SHARE,
    )
    assert with_lists.num_tokens > 3 * alone.num_tokens
    assert with_lists.weights_sha256 != alone.weights_sha256
    for wrong in ("many", [1], [10**9], {"2": 3}):
        with pytest.raises(GrowthError, match=r"numbers from 2 to 50 .* build the checkpoint"):
            joined(wrong)
    long = json.dumps({"prompt": "a" * 600, "response": "b"})
    (tmp_path / "long.jsonl").write_text(f"{long}\n" * 2)
    found = FoundCheckpoint(folder, recipe_folder / "base", device="cpu")
    asked = Candidate("long", str(world.adapters["all_seven"]))
    with pytest.raises(ExamplesError, match=r"2 examples are too long: .*long.jsonl, line 1"):
        edit.add(work.ledger, found, asked, f"jsonl:{tmp_path / 'long.jsonl'}")


@pytest.mark.parametrize("targets", [["v_proj"], list(ATTENTION)], ids=["bare leader", "all"])
def test_what_a_drop_leaves_and_a_recipe_of_the_same_experts_stand_side_by_side(
    workplace: Callable[..., RunContext],
    build_adapter: Callable[..., Path],
    world: World,
    tmp_path: Path,
    targets: list[str],
) -> None:
    """One is of 32 bits and one of 16. Without q_proj, its gate goes on to decide for v_proj."""
    adapters = {"q_and_v": world.adapters["q_and_v"]}
    adapters["low"] = build_adapter(
        world.base, tmp_path / "low", seed=5, dtype=torch.bfloat16, r=4, target_modules=targets
    )

    def fitted(*names: str) -> tuple[RunContext, Path]:
        experts = [
            {"name": n, "adapter": f"path:{adapters[n]}", "examples": "jsonl:q_and_v.train.jsonl"}
            for n in names
        ]
        work = workplace(experts=experts, benchmark={"limit": 1, "compare": []})
        planned, gates = fit(work)
        return work, build.write_checkpoint(work, planned, gates)

    work, both = fitted("q_and_v", "low")
    _, alone = fitted("low")
    dropped = edit.drop(work.ledger, both, "q_and_v")
    left, fresh = read_manifest(dropped), read_manifest(alone)
    same = file_sha256(dropped / EXPERTS) == file_sha256(alone / EXPERTS)
    assert (left.fused_id == fresh.fused_id) == same == (len(targets) > 1)
    assert {a.dtype for _, a, _ in read_experts(dropped, left)} == {torch.bfloat16}
    work.ledger.ingest()
    assert work.ledger.weights_of(ArtifactId(left.fused_id)) == file_sha256(dropped / EXPERTS)
    assert recorded_router(work.ledger, FoundCheckpoint(dropped, world.base), left) is not None


def test_offsets_stay_where_only_the_dropped_expert_had_the_module(
    workplace: Callable[..., RunContext],
    world: World,
    build_adapter: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("meteora.model.opening_offsets.LEAST_SHARE", -1.0)  # everywhere
    low = build_adapter(world.base, tmp_path / "low", seed=5, r=4, target_modules=["v_proj"])
    adapters = {name: world.adapters[name] for name in ("q_and_v", "attention")} | {"low": low}
    experts = [
        {"name": n, "adapter": f"path:{path}", "examples": "jsonl:q_and_v.train.jsonl"}
        for n, path in adapters.items()
    ]
    work = workplace(experts=experts, benchmark={"limit": 1, "compare": []})
    planned, gates = fit(work)
    folder = build.write_checkpoint(work, planned, gates)
    before = read_gates(folder, read_manifest(folder)).offsets
    dropped = edit.drop(work.ledger, folder, "attention")
    after = read_gates(dropped, read_manifest(dropped)).offsets
    assert after.keys() == before.keys()
    for path, rows in after.items():
        assert torch.equal(rows, before[path][[0, 2, 3]])
    model, tokenizer = meteora.load(dropped, base_folder=world.base)
    assert meteora.generate(model, tokenizer, "abcdabcd", max_new_tokens=3)


def test_no_base_is_loaded_whose_tokenizer_cannot_place_composites(
    made: tuple[RunContext, Path], recipe_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    work, folder = made
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    body = json.loads((mixed / MANIFEST).read_text())
    (mixed / MANIFEST).write_text(json.dumps(body | {"gates": body["gates"] | {"composites": [2]}}))
    monkeypatch.setattr(edit, "load_tokenizer", lambda _base: SimpleNamespace(is_fast=False))
    monkeypatch.setattr(edit, "load_base", None)
    found = FoundCheckpoint(mixed, recipe_folder / "base", device="cpu")
    rows = f"jsonl:{recipe_folder / 'attention.train.jsonl'}"
    with pytest.raises(GrowthError, match="take `composites` out of its recipe"):
        edit.add(work.ledger, found, Candidate("new", str(recipe_folder / "attention")), rows)


def test_a_checkpoint_from_elsewhere_grows_without_a_record(
    made: tuple[RunContext, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, folder = made
    stranger = Ledger(tmp_path / "stranger")
    out = edit.drop(stranger, folder, "q_and_v")
    assert read_manifest(out).names == ["attention"]
    assert "not recorded" in capfd.readouterr().err
    assert {path.name for path in out.iterdir()} > {EXPERTS, GATES, STATISTICS}
    built = json.loads((out / LINEAGE).read_text())["predicate"]["buildDefinition"]
    base, expert, parent = built["resolvedDependencies"]
    assert (base["name"], expert["name"]) == ("base", "expert attention")
    assert (parent["name"], parent["uri"]) == ("router", read_manifest(folder).router_id)


def test_a_new_expert_s_data_set_of_the_hub_is_in_the_lineage(
    made: tuple[RunContext, Path], recipe_folder: Path, hub: HubServer
) -> None:
    work, folder = made
    without = edit.drop(work.ledger, folder, "attention")
    lines = "".join(json.dumps(row) + "\n" for row in letters("attention", 0, 8))
    hub.repos["somebody/letters"] = Main({"train.jsonl": lines.encode()})
    hub.repos["somebody/letters"].card = {"license": "mit"}
    out = edit.add(
        work.ledger,
        FoundCheckpoint(without, recipe_folder / "base", device="cpu"),
        Candidate("attention", str(recipe_folder / "attention")),
        "hf:somebody/letters?split=train",
    )
    named = f"datasets/somebody/letters@{hub.repos['somebody/letters'].commit}"
    for text in (
        (out / LINEAGE).read_text(),
        attest(work.ledger, ArtifactId(read_manifest(out).router_id)),
    ):
        built = json.loads(text)["predicate"]["buildDefinition"]
        (rows,) = (
            one for one in built["resolvedDependencies"] if one["name"] == "examples of attention"
        )
        assert rows["uri"] == f"hf://{named}"
        assert rows["annotations"] == {"licence": "mit"}


def test_a_stranger_s_files_are_not_recorded_under_an_id_of_the_ledger(
    made: tuple[RunContext, Path], recipe_folder: Path, tmp_path: Path
) -> None:
    """Ids are public; a recipe's run would take the experts for its own."""
    work, folder = made
    evil = shutil.copytree(folder, tmp_path / "evil")
    body = json.loads((evil / MANIFEST).read_text())
    numbers = {path: torch.full_like(one, 7.0) for path, one in load_file(evil / EXPERTS).items()}
    (evil / EXPERTS).unlink()
    save_file(numbers, evil / EXPERTS)
    body["files"][EXPERTS] = file_sha256(evil / EXPERTS)
    (evil / MANIFEST).write_text(json.dumps(body))
    before = work.ledger.records.loose()
    said = "names the id router:.*, which the ledger has with other files, routing or base"
    with pytest.raises(ForeignCheckpointError, match=said):
        edit.drop(work.ledger, evil, "q_and_v")
    found = FoundCheckpoint(evil, recipe_folder / "base", device="cpu")
    with pytest.raises(ForeignCheckpointError, match=said):
        edit.add(work.ledger, found, Candidate("new", str(recipe_folder / "attention")), "jsonl:x")
    assert work.ledger.records.loose() == before


def test_a_base_that_was_saved_again_is_named_where_it_alone_differs(
    made: tuple[RunContext, Path], recipe_folder: Path, tmp_path: Path
) -> None:
    work, folder = made
    again = shutil.copytree(recipe_folder / "base", tmp_path / "again")
    weights = again / "model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "saved": "again"})
    with pytest.raises(ForeignCheckpointError, match="again has other files than the base that r"):
        as_recorded(work.ledger, FoundCheckpoint(folder, again))
    assert as_recorded(work.ledger, FoundCheckpoint(folder)).folder == folder


def test_what_cannot_grow_says_why(
    made: tuple[RunContext, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, folder = made
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused = ask("drop", folder, "nobody", "--home", work.home)
    assert refused.returncode == 1
    assert "there is no expert 'nobody'; " in " ".join(refused.stderr.split())
    for name, rows, sentence in (
        ("a=b", "jsonl:none", "the name 'a=b' may hold letters from a to z"),
        ("composite-3", "jsonl:none", "the name 'composite-3' is that of a mix of tasks"),
        ("attention", "jsonl:none", "there is an expert 'attention' already"),
        ("sums", "hf:a/b", "hf:a/b names no split, so its test rows would be read"),
        ("sums", "jsonl:none", "no/adapter names no commit"),
    ):
        refused = ask("add", folder, name, "no/adapter", rows, "--home", work.home)
        assert refused.returncode == 1
        assert sentence in " ".join(refused.stderr.split())
    rows = ["jsonl:none", "--test", "jsonl:none"]
    refused = ask("add", "no/such", "sums", "./adapter", *rows, "--home", work.home)
    assert "adapter: there is no such folder; check the path" in " ".join(refused.stderr.split())
    late = [{"prompt": str(n), "response": "a"} for n in range(150)]  # the last is in both
    for name, own in (("examples", late[-1:]), ("tests", late)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    rows = [f"jsonl:{tmp_path}/examples.jsonl", "--test", f"jsonl:{tmp_path}/tests.jsonl"]
    refused = ask("add", folder, "sums", tmp_path, *rows, "--home", work.home)
    assert "tests.jsonl, line 150" in " ".join(refused.stderr.split())
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in folder.iterdir():
        if path.name != STATISTICS:
            (bare / path.name).symlink_to(path)
    refused = ask("drop", bare, "attention", "--home", work.home)
    assert refused.returncode == 1
    assert "has no gates with statistics.safetensors" in " ".join(refused.stderr.split())
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    body = json.loads((changed / MANIFEST).read_text())
    for change, sentence in (
        ({"gates": {}}, "it does not say how its gates were made"),
        ({"router": body["router"] | {"kind": "norm", "opening": "own"}}, "the router `norm`"),
        (
            {"router": body["router"] | {"kind": "prompt", "opening": "own"}},
            "(here: the router `prompt`)",
        ),
    ):
        (changed / MANIFEST).write_text(json.dumps(body | change))
        refused = ask("drop", changed, "attention", "--home", work.home)
        assert refused.returncode == 1
        assert sentence in " ".join(refused.stderr.split())
    assert not [*(work.home / "runs").iterdir()]


@pytest.mark.parametrize(
    ("part", "value", "sentence"),
    [
        ("means", torch.zeros(1, 1), "statistics that do not fit"),
        ("scalars", torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64), "that do not fit"),
        ("scalars", torch.tensor([1.0, torch.nan, 0.5], dtype=torch.float64), "NaN or infinity"),
        ("rows", torch.zeros(3, dtype=torch.int32), "it has tensors of I32"),
    ],
    ids=["sizes", "negative", "nan", "integers"],
)
def test_statistics_of_a_stranger_are_checked(
    made: tuple[RunContext, Path], tmp_path: Path, part: str, value: torch.Tensor, sentence: str
) -> None:
    work, folder = made
    copied = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copied / STATISTICS)
    key = next(key for key in tensors if key.endswith(f".gate.{part}"))
    (copied / STATISTICS).unlink()
    save_file(tensors | {key: value}, copied / STATISTICS)
    with pytest.raises(CheckpointError, match="its SHA-256 is not the one"):
        edit.drop(work.ledger, copied, "attention")
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps(manifest | {"files": {}}))
    with pytest.raises(CheckpointError, match=sentence):
        edit.drop(work.ledger, copied, "attention")
