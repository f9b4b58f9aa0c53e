import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from meteora.base.chat_template import encode_messages
from meteora.base.loading import load_tokenizer
from meteora.base.shapes import Shape, shape_of
from meteora.routing.gates import Sharing
from pipelines.data.row_sources import read_rows
from pipelines.planning import dry_run
from pipelines.planning import needs as printed
from pipelines.planning.estimate import assumed_ranks, estimate
from pipelines.planning.fit_estimate import bytes_of_gates
from pipelines.planning.passes import Experts, Need, Rows, rows_at_once, working_bytes
from pipelines.planning.row_faults import faults_of_rows
from pipelines.recipe.benchmark import BenchmarkSection
from pipelines.recipe.recipe import Recipe, locate
from pipelines.workspace.context import RunContext
from pipelines.workspace.machine import Machine, measure_machine
from tests.conftest import World
from tests.pages import ROOT, fences
from tests.pipelines.cli.command_line import ask, done
from tests.pipelines.conftest import finished, print_steps

GPU = Machine("made up", 400e12, 3e12, 6e-6, 1e9, 80e9)
SIZES: dict[str, dict[str, int]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "llama2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13_824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32_000,
    },
}
SYSTEM = "x" * 4 * 4 * (256 + 64)
"""A system prompt with as many tokens as four rows."""
PAPER = [pytest.param(f"{base}{top}", id=f"{base}{top}") for base in SIZES for top in ("", "-top2")]


def config_of(name: str) -> dict[str, Any]:
    sizes = SIZES[name.removesuffix("-top2")]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        **sizes,
    }


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that need not be measured."""
    monkeypatch.setattr(printed, "measure_machine", lambda _dtype: GPU)


@pytest.fixture
def offline(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    known_machine: None,  # noqa: ARG001
) -> Path:
    """No network, an empty folder to be in, and where the Hub's client would keep its files."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "hub"


def keep_config(hub: Path, name: str) -> None:
    """As the Hub's client keeps a file of a commit."""
    repo_id, _, commit = Recipe.load(locate(name)).base.partition("@")
    folder = hub / f"models--{repo_id.replace('/', '--')}" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(name)))


def gigabytes(said: str, stage: str) -> tuple[float, float]:
    """A stage's memory and disk, as they were printed."""
    memory, disk = re.findall(rf"  {stage} +memory +([\d,.]+) GB   disk +([\d,.]+) GB", said)[0]
    return float(memory), float(disk)


@pytest.mark.parametrize("name", PAPER)
def test_a_setting_of_the_paper_is_estimated_without_a_network(
    name: str, offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_config(offline, name)
    work = RunContext.open(name, tmp_path / "home")
    assert finished(work) is None
    print_steps(work)
    said = capsys.readouterr().out
    assert not (tmp_path / "home").exists()
    small = name.startswith("llama3")
    # 8.03 and 13.02 billion parameters; 587 and 876 million of adapters, and 34.9 and 49.9 million
    # of gates, as can be computed from the paper's setting by hand; and for each input point 128
    # directions in 16 bits, 28 means and a shift
    assert gigabytes(said, "base")[1] == pytest.approx(16.1 if small else 26.0, abs=0.05)
    assert gigabytes(said, "stack")[1] == pytest.approx(2.3 if small else 3.5, abs=0.051)
    assert gigabytes(said, "gates")[1] == pytest.approx(0.45 if small else 0.63, abs=0.051)
    # beside base and adapters the keys and values of composites of ten; the 8B's merges, too
    assert 70 > gigabytes(said, "benchmark")[0] > (35 if small else 55)
    assert "needed for: benchmark" not in said
    assert re.search("[0-9]+ to 64 prompts at a time, by this memory", said)
    assert "28 of 28 adapters are not here, or refused: taken as rank 8" in said
    assert "56 of 56 sources of rows are not here" in said
    assert f"top_k {2 if name.endswith('top2') else 1}" in said


def test_of_many_adapters_that_are_alike_only_the_first_have_a_line(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """But each refused one has its own: a person must change the recipe there."""
    assert not offline.exists()
    names = [f"e{number}" for number in range(100)]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"")
    experts = [{"name": name, "adapter": f"path:nowhere/{name}"} for name in names]
    experts += [{"name": f"bad{number}", "adapter": "path:bad"} for number in range(40)]
    recipe = {"base": f"a/b@{'0' * 40}", "experts": experts, "router": {"kind": "norm"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    print_steps(RunContext.open(str(tmp_path / "recipe.yaml"), tmp_path / "home"))
    said = capsys.readouterr().out
    assert len(re.findall("^expert     e", said, re.MULTILINE)) == dry_run.MOST_ALIKE
    assert f"           and {100 - dry_run.MOST_ALIKE} more experts: not here\n" in said
    assert len(re.findall("^expert     bad[0-9]+: .* refused", said, re.MULTILINE)) == 40


def test_the_page_on_hardware_shows_what_is_estimated(
    offline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but the times of the CPU that it was measured on, and what is free on a disk."""
    page = ROOT / "pipelines/docs/hardware.md"
    on_cpu, on_card = fences(page, "text")
    recipe = tmp_path / "eight.yaml"
    recipe.write_text(fences(page, "yaml")[0])
    keep_config(offline, "llama3-8b")

    def estimated(machine: Machine) -> str:
        monkeypatch.setattr(printed, "measure_machine", lambda _dtype: machine)
        print_steps(RunContext.open(str(recipe), tmp_path / "home"))
        return capsys.readouterr().out

    def plain(text: str) -> str:
        return re.sub(r"of [\d,.]+ GB that are free", "", " ".join(text.split()))

    card = Machine("a card of 24 GB, assumed", 100e12, 0.9e12, 6e-6, 1e9, 24e9)
    assert plain(on_card) in plain(estimated(card))
    said = estimated(Machine("cpu", 201e9, 7.6e9, 2.5e-6, 1.8e9, 64e9, is_cpu=True))
    for stage in ("base", "check", "stack", "gates", "benchmark"):
        assert gigabytes(said, stage) == gigabytes(on_cpu, stage)
    (large,) = re.findall("on one H100.*", said)
    assert large in on_cpu


def test_without_the_bases_config_a_dry_run_says_that_nothing_can_be_estimated(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not offline.exists()
    print_steps(RunContext.open("llama3-8b", tmp_path / "home"))
    said = capsys.readouterr().out
    assert "the run would stop: the Hub was not reached for its base" in said
    assert (
        "meta-llama/Meta-Llama-3-8B at 8cde5ca83804, to download; the Hub was not reached" in said
    )
    assert "cannot be estimated: the base's config is not here" in said


@pytest.mark.usefixtures("hub_here")
@pytest.mark.parametrize("revision", ["main", "0" * 40])
def test_where_the_hub_is_away_each_name_is_told_once(
    revision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    recipe = tmp_path / "away.yaml"
    expert = f"{{name: one, adapter: someone/lora@{revision}}}"
    recipe.write_text(f"base: someone/base@main\nexperts: [{expert}]\nrouter: {{kind: arrow}}\n")
    said = ask("run", recipe, "--dry-run", "--home", tmp_path / "home")
    base, expert, *_, last = said.stdout.splitlines()
    assert said.returncode == 1, "no run can begin without them"
    assert last == "the run would stop: the Hub was not reached for its base, one"
    for line, name in ((base, "someone/base"), (expert, "someone/lora")):
        assert line.count(name) == 1, line
        assert "not here: " in line
        assert "http://127.0.0.1:9 cannot be reached" in line


def test_what_is_here_is_looked_at(
    recipe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    print_steps(RunContext.open(str(recipe_folder / "recipe.yaml"), tmp_path / "home"))
    said = capsys.readouterr().out
    assert "Estimated, to a factor of two or so, for this machine (" in said
    assert "not here" not in said
    assert [gigabytes(said, stage)[1] for stage in ("base", "stack", "gates")] == [0, 0, 0]


def test_local_adapters_are_judged_and_the_parts_that_take_long_are_named(
    recipe_folder: Path, tmp_path: Path
) -> None:
    said = done("run", recipe_folder / "recipe.yaml", "--dry-run", "--home", tmp_path / "home")
    assert re.search("q_and_v: path:q_and_v, accepted, rank [0-9]", said.stdout)
    assert "warning: " in said.stdout  # its config names a folder as its base
    for part in ("asking", "measuring routing", "measuring switches"):
        assert re.search(rf"\n +{part}, (< 1 s|[0-9])", said.stdout)
    assert re.search(r"disk: [0-9.]+ GB at most, of [0-9,.]+ GB that are free there", said.stdout)
    assert "would stop" not in said.stdout


@pytest.mark.usefixtures("known_machine")
def test_two_names_of_one_adapter_and_a_task_that_is_none_are_told(
    workplace: Callable[..., RunContext], recipe_folder: Path, tmp_path: Path
) -> None:
    first, second = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())["experts"][:2]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "mine.yaml").write_text("task: mine_to_ask\n")
    task = {"lm_eval": "mine_to_aks", "folder": str(mine)}
    faults: dict[str, dict[str, Any]] = {
        "speed: prompts of 900,000 tokens and answers of 32 are too long, since the base has": {
            "benchmark": {"speed": {"prompt_tokens": 900_000}}
        },
        "these cannot be stacked: ": {"experts": [first, second | {"adapter": first["adapter"]}]},
        f"there is no task 'mine_to_aks' in {mine} (did you mean 'mine_to_ask'?)": {
            "benchmark": {"tasks": [task]}
        },
    }
    for sentence, changed in faults.items():
        work = workplace(**changed)
        said = ask("run", work.path, "--dry-run", "--home", tmp_path / "home")
        assert said.returncode == 1
        assert f"the run would stop: {sentence}" in said.stdout


@pytest.mark.usefixtures("known_machine")
def test_gates_whose_only_examples_are_those_of_a_refused_adapter_are_told(
    workplace: Callable[..., RunContext], recipe_folder: Path, tmp_path: Path
) -> None:
    first, second = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())["experts"][:2]
    shutil.copytree(recipe_folder / first["name"], tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"")
    del second["examples"]
    work = workplace(
        experts=[first | {"adapter": f"path:{tmp_path / 'broken'}"}, second],
        policy={"on_refused": "skip"},
        router={"without_examples": "arrow"},
    )
    said = ask("run", work.path, "--dry-run", "--home", tmp_path / "home")
    assert "the run would stop: no expert that is left has examples" in said.stdout
    assert said.returncode == 1


def test_an_adapter_in_place_of_the_base_is_told(
    workplace: Callable[..., RunContext], recipe_folder: Path, tmp_path: Path
) -> None:
    work = workplace(base="path:q_and_v")
    for more in ((), ("--dry-run",)):
        said = ask("run", work.path, *more, "--home", tmp_path / "home")
        assert said.returncode == 1
        assert f"{recipe_folder / 'q_and_v'}: there is no config.json in it; give" in said.stderr


@pytest.mark.usefixtures("known_machine")
def test_it_ends_with_an_error_where_the_run_would(
    workplace: Callable[..., RunContext],
    recipe_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    body = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
    good = body["experts"]

    def ends(sentence: str, **changes: object) -> None:
        work = workplace(**changes)
        said = ask("run", work.path, "--dry-run", "--home", tmp_path / "home")
        assert said.returncode == (1 if sentence else 0), said.stderr
        assert f"the run would stop: {sentence}" in said.stdout or not sentence
        assert not (tmp_path / "home").exists()

    shutil.copytree(recipe_folder / "q_and_v", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"")
    broken = good[0] | {"adapter": f"path:{tmp_path / 'broken'}"}
    ends("q_and_v is refused", experts=[broken, good[1]])
    ends("", experts=[broken, good[1]], policy={"on_refused": "skip"})
    ends("no adapter can be used", experts=[broken], policy={"on_refused": "skip"})
    rowless = broken | {"examples": "jsonl:none.jsonl", "test": "jsonl:none.jsonl"}
    ends("", experts=[rowless, good[1]], policy={"on_refused": "skip"})

    gone = f"{tmp_path / 'gone'}: there is no such folder"
    nowhere = good[0] | {"adapter": f"path:{tmp_path / 'gone'}"}
    ends(gone, experts=[nowhere, good[1]])
    ends(gone, experts=[nowhere, good[1]], policy={"on_refused": "skip"})

    wide = tmp_path / "wide"
    shutil.copytree(recipe_folder / "base", wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    ends("q_and_v is refused", base=f"path:{wide}")

    test = good[0]["test"]
    ends("task q_and_v: ", experts=[good[0] | {"examples": test}, good[1]])
    ends(str(recipe_folder / "none.jsonl"), experts=[good[0] | {"test": "jsonl:none.jsonl"}])
    row = {"prompt": "a", "response": "b"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    one = good[0] | {"examples": f"jsonl:{tmp_path / 'one.jsonl'}"}
    ends("expert q_and_v has 1 of the 2 examples that a gate needs", experts=[one, good[1]])
    shown = {"composites": [{"n": 2, "num_fewshot": 1}]}
    few = "gates.composites, n: 2: task q_and_v: 1 different prompts of its rows"
    ends(few, experts=[one, good[1]], gates=shown)
    ends("", experts=[one, good[1]], gates={"composites": [2]})
    ends("auto: rows come from", experts=[good[0] | {"test": "auto"}, good[1]])
    parts = {"prompt": [{"text": "a"}], "response": [{"text": "b", "expert": "q_and_v"}]}
    (tmp_path / "spans.jsonl").write_text(json.dumps(parts))
    spans = {"spans": f"jsonl:{tmp_path / 'spans.jsonl'}"}
    ends("", experts=[one, good[1]], gates=spans)
    ends(str(recipe_folder / "gone.jsonl"), gates={"spans": "jsonl:gone.jsonl"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    away = {"adapter": f"someone/lora@{'0' * 40}"}
    for metric, lack, where in (
        ("acc", "no choices", {}),
        ("acc", "no choices", away),
        ("verified", "no scorer", {}),
    ):
        asked = [good[0] | {"metric": metric} | where, good[1]]
        said = ask("run", workplace(experts=asked).path, "--dry-run", "--home", tmp_path / "home")
        assert said.returncode == 1
        assert re.search(f"would stop: task q_and_v: the prompt '.*' has {lack}", said.stdout)
    monkeypatch.setattr(printed, "free_bytes", lambda _folder: 1)
    ends(str(tmp_path / "home"))


def test_composites_are_judged_by_the_examples_of_all_experts(
    workplace: Callable[..., RunContext], recipe_folder: Path, tmp_path: Path
) -> None:
    """Two experts take fewer examples of each than one alone does."""
    rows = ({"prompt": text, "response": text} for text in "abc")
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())["experts"]
    one |= {"examples": f"jsonl:{tmp_path / 'three.jsonl'}"}
    gates = {"composites": [{"n": 2, "num_fewshot": 1}]}
    (fault,) = faults_of_rows(workplace(experts=[one], gates=gates), None, read_rows)
    assert fault.startswith("gates.composites, n: 2: task q_and_v: 3 different prompts")
    elsewhere = other | {"examples": "hf:owner/rows?split=train"}
    assert not faults_of_rows(workplace(experts=[one, elsewhere], gates=gates), None, read_rows)


@pytest.mark.usefixtures("known_machine")
@pytest.mark.parametrize(
    ("until", "shown"),
    [
        ("base", {"base"}),
        ("check", {"base", "expert"}),
        ("stack", {"base", "expert", "stack"}),
        ("gates", {"base", "expert", "stack", "router", "gates"}),
        ("benchmark", {"base", "expert", "stack", "router", "gates", "benchmark"}),
    ],
)
def test_only_stages_that_are_reached_are_told(
    until: str, shown: set[str], recipe_folder: Path, tmp_path: Path
) -> None:
    words = ("run", recipe_folder / "recipe.yaml", "--dry-run", "--until", until)
    said = done(*words, "--home", tmp_path / "home")
    names = {"base", "expert", "stack", "router", "gates", "benchmark", "publish"}
    assert {line.split()[0] for line in said.stdout.splitlines() if line.strip()} & names == shown


SHAPE_SIZES = {"layers.0.attn.q": (64, 64), "layers.0.mlp.up": (64, 256), "head": (64, 999)}


def shape() -> Shape:
    import torch  # noqa: PLC0415

    from meteora.base.shapes import Shape  # noqa: PLC0415

    return Shape(
        num_parameters=10**9,
        dtype=torch.bfloat16,
        num_layers=20,
        hidden_size=64,
        intermediate_size=256,
        vocab_size=999,
        cache_bytes_per_token=10_000,
        linears=SHAPE_SIZES,
        head_parameters=64 * 999,
    )


def needs(
    changes: dict[str, Any] | None = None,
    *,
    gates: dict[str, Any] | None = None,
    router: dict[str, Any] | None = None,
    quantise: str | None = None,
    expert_cache_bytes: int | None = None,
    base: Shape | None = None,
    metric: str = "exact_match",
    **asked: Any,
) -> dict[str, Any]:
    text = {
        "base": "a/b",
        "quantise": quantise,
        "expert_cache_bytes": expert_cache_bytes,
        "experts": (
            {
                "name": "x",
                "adapter": "path:x",
                "examples": "jsonl:x",
                "test": "jsonl:x",
                "metric": metric,
            },
        ),
        "benchmark": {"compare": ("base",), "batch_size": 4, **(changes or {})},
        "gates": gates or {},
        "router": router or {},
    }
    given: dict[str, Any] = {
        "experts": Experts(1, dict.fromkeys(["layers.0.attn.q", "layers.0.mlp.up"], 8)),
        "machine": GPU,
        "examples": {"x": Rows(64)},
        "tests": {"x": Rows(100)},
    }
    found = estimate(Recipe.model_validate(text), base or shape(), **(given | asked))
    return {need.stage: need for need in found}


def test_gates_take_the_longer_the_more_they_are_taught() -> None:
    def seconds(router: dict[str, Any] | None = None, **gates: Any) -> float:
        gates = {"conversations": (), "system_prompts": (), **gates}
        return needs(gates=gates, router=router or {})["gates"].seconds

    plain = seconds()
    assert 1.2 * plain < seconds(composites=(3,)) < seconds(composites=(3, 5)) < 2 * plain
    assert seconds(composites=({"n": 3, "num_fewshot": 2},)) > seconds(composites=(3, 5))
    joint: dict[str, Any] = {"method": "joint", "batch_size": 64}
    for steps in (10, 1000):  # each goes through all 64 rows; the sweep took about 1.1 passes
        taught = seconds(**joint, steps=steps, start="zeros")
        assert taught == pytest.approx(plain * steps / 1.1, rel=0.3)
    assert seconds(system_prompts=("", SYSTEM)) == pytest.approx(2 * plain, rel=0.2)
    one, mixed = (seconds({"top_k": k}, **joint, steps=1000) for k in (1, 2))
    assert mixed == pytest.approx(3 * one, rel=0.1)
    assert needs(gates=joint)["gates"].disk_bytes == 4 * (64 + 64)  # no statistics
    saved = 4 * 3 * 4 * (64 + 64)  # with moments, and choices of all and of the base
    assert needs(gates=joint)["gates"].scratch_bytes == saved


def test_the_disk_has_to_hold_what_a_stage_writes_until_its_results_are_recorded() -> None:
    stack, gates = Need("stack", 0, 5, 0), Need("gates", 0, 1, 0, scratch_bytes=4)
    assert printed._most_on_disk([stack, gates]) == 9
    assert printed._most_on_disk([gates, stack]) == 6


def test_the_fit_of_the_quickstart_is_estimated_as_it_was_measured(tmp_path: Path) -> None:
    """95 to 116 s of processor time on one thread of an AMD EPYC, and its speed at that time."""
    sizes = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49_152,
        "tie_word_embeddings": True,
    }
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    small = shape_of(tmp_path)
    lengths = {
        "a": (29, 9),
        "b": (23, 2),
        "c": (32, 10),
        "d": (24, 3),
        "e": (34, 14),
        "f": (32, 10),
    }
    experts = tuple({"name": n, "adapter": "path:x", "examples": "jsonl:x"} for n in lengths)
    found = estimate(
        Recipe.model_validate({"base": "a/b", "experts": experts}),
        small,
        experts=Experts(6, assumed_ranks(small)),
        machine=Machine("one thread", 245e9, 25e9, 1.8e-6, 2e9, 64e9, is_cpu=True),
        examples={name: Rows(64, *length) for name, length in lengths.items()},
        tests={},
        opening_tokens=19,
    )
    (gates,) = (need for need in found if need.stage == "gates")
    assert 116 / 1.3 < gates.seconds < 95 * 1.3
    assert gates.disk_bytes == pytest.approx(27.9e6 + 3.2e6, rel=0.05)  # as its run said


def test_what_comes_after_attention_has_an_input_of_its_own() -> None:
    def kept(*names: str) -> float:
        return bytes_of_gates({f"layers.0.attn.{name}": 64 for name in names}, 3, "point")[1]

    assert kept("q_proj", "k_proj", "v_proj") == kept("o_proj")
    assert kept("q_proj", "k_proj", "v_proj", "o_proj") == 2 * kept("o_proj")


@pytest.mark.parametrize("share", ["module", "point", "turn", "layer", "token"])
def test_the_points_that_get_a_gate_are_counted(share: str) -> None:
    modules = {"attn.q_proj": 64, "attn.v_proj": 64, "attn.o_proj": 64, "mlp.down_proj": 256}
    inputs = {f"layers.{n}.{name}": width for n in range(10) for name, width in modules.items()}
    sharing, fitted = Sharing(share, 10), {}
    for path, width in inputs.items():
        index = int(path.split(".")[1])
        if "v_proj" not in path and sharing.decided(index) is None:
            sharing.new(index)
            fitted[path] = width
    assert len(fitted) == {"layer": 10, "token": 10}.get(share, 30)
    assert bytes_of_gates(inputs, 3, share)[1] == bytes_of_gates(fitted, 3, "point")[1]


def test_the_tokens_of_a_chat_template_are_counted(world: World, chat_base: Path) -> None:
    recipe = Recipe.model_validate(
        {"base": "a/b", "experts": ({"name": "x", "adapter": "path:x", "examples": "jsonl:x"},)}
    )
    tokenizer = load_tokenizer(chat_base)
    opening, turn = printed.tokens_of_template(recipe, tokenizer)
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant") * 3][:-1]
    assert len(encode_messages(tokenizer, talk)) == opening + 3 * turn + 5
    assert opening > 0
    assert turn > 0
    assert printed.tokens_of_template(recipe, load_tokenizer(world.base)) == (0, 0)
    assert printed.tokens_of_template(recipe, None) == (0, 0)
    plain = needs(opening_tokens=0.0)["gates"]
    assert needs(opening_tokens=320.0)["gates"].seconds > 1.3 * plain.seconds


def test_the_head_counts_where_the_logits_of_every_token_are_asked() -> None:
    """In a training through the model and for answers that are choices; else of the last alone."""
    wide = 10**9  # parameters of the embeddings, which are most of some small bases
    bases = [replace(shape(), vocab_size=wide // 64, head_parameters=0, num_parameters=2 * wide)]
    bases.append(replace(bases[0], vocab_size=64, num_parameters=wide))
    joint = {"method": "joint", "system_prompts": ()}

    def ratio(stage: str, metric: str = "exact_match", **asked: Any) -> float:
        one, other = (
            needs(base=base, metric=metric, tests={"x": Rows(10**6, choices=4.0)}, **asked)[stage]
            for base in bases
        )
        return one.seconds / other.seconds

    assert ratio("gates", gates=joint, router={"top_k": 1}) == pytest.approx(1.0, rel=0.05)
    assert ratio("gates", gates=joint, router={"top_k": 2}) == pytest.approx(1 + 1 / 1.2, rel=0.1)
    assert ratio("benchmark", "acc") > 1.5


def test_a_backward_pass_through_the_model_takes_memory_for_each_token_of_a_batch() -> None:
    def memory(top_k: int, batch_size: int, **settings: Any) -> float:
        gates = {"method": "joint", "batch_size": batch_size, "system_prompts": (), **settings}
        return needs(gates=gates, router={"top_k": top_k})["gates"].memory_bytes

    tokens = 1000 * 4 * (256 + 64)  # of the longest conversations
    layer = 2 * (8 * 64 + 4 * 256 + ((2 * 64 + 64) + (2 * 64 + 256)) / 20)  # of a token, in bytes
    more = memory(2, 2000) - memory(2, 1000)
    assert more == pytest.approx(tokens * (21 * layer + (2 + 8) * 999))
    less = memory(2, 2000) - memory(2, 2000, gradient_checkpointing=True)
    assert less == pytest.approx(2 * tokens * 20 * (layer - 2 * 64))
    assert memory(1, 2000) == memory(1, 1000) < memory(2, 1000)  # no gradient leaves a layer
    under = [memory(2, n, system_prompts=("", SYSTEM)) for n in (1000, 2000)]
    assert under[1] - under[0] == pytest.approx(2 * more)


def test_conversations_take_the_longer_the_more_a_control_computes_again() -> None:
    names = ("x", "y")
    experts = tuple(
        {"name": name, "adapter": "path:a", "examples": "jsonl:e", "test": "jsonl:t"}
        for name in names
    )

    def seconds(
        *compare: str,
        own: int | None = None,
        limit: int = 4,
        lists: bool = False,
        count: int | None = 20,
        num_rows: int = 1,
    ) -> float:
        rows = dict.fromkeys(names, Rows(num_rows, prompt_tokens=500))
        settings = {
            "compare": compare,
            "max_new_tokens": limit,
            "conversation": ({"n": 10, "count": count},),
            "composite": ({"n": 2},) * lists,
        }
        limited = tuple(expert | {"max_new_tokens": own} for expert in experts)
        text = {"base": "a/b", "experts": limited, "benchmark": settings}
        found = estimate(
            Recipe.model_validate(text),
            shape(),
            experts=Experts(2, assumed_ranks(shape())),
            machine=Machine("slow", 4e12, 3e10, 6e-6, 1e9, 80e9),
            examples=rows,
            tests=rows,
        )
        return found[-1].parts["asking"]

    fused = seconds()
    single, swap, best = (seconds(name) - fused for name in ("single", "swap", "one_expert"))
    assert single < 1.2 * fused
    assert swap > 2 * fused
    assert best > 1.5 * fused  # both are tried
    assert seconds(count=40) > 1.5 * fused
    # by default there are 20, which have 200 turns, or fewer where tasks have fewer rows
    assert seconds(count=None, num_rows=100) == seconds(count=20, num_rows=100)
    assert seconds(count=None, num_rows=50) == seconds(count=10, num_rows=50)
    for lists in (False, True):  # a task's own limit comes first
        known = seconds(lists=lists)
        assert seconds(own=4, limit=64, lists=lists) == known < seconds(own=8, lists=lists)


def test_mixes_of_questions_have_none_of_a_task_of_lm_eval() -> None:
    foreign = {"tasks": ({"lm_eval": "y"},)}
    tests = {"x": Rows(100), "y": Rows(100, prompt_tokens=9000)}

    def composites(tasks: dict[str, Any]) -> float:
        given = {**foreign, "composite": ({"n": 3, **tasks},)}
        return needs(given, tests=tests)["benchmark"].seconds

    assert composites({}) == composites({"tasks": ("x",)})


def test_estimates_grow_with_what_they_are_of() -> None:
    plain = needs()
    assert plain["stack"].disk_bytes == 4 * 8 * (64 + 64 + 64 + 256)
    kept = 2 * (2 * 64 * 64 + 4 * 2 * 64)  # of two points: all directions, a mean and a shift
    assert plain["gates"].disk_bytes == 4 * (64 + 64) + kept
    assert plain["base"].disk_bytes == 2e9
    systems = ("base", "uniform", "ties")
    few, more, merged = (needs({"compare": systems[:n]})["benchmark"] for n in (1, 2, 3))
    assert few.seconds < more.seconds < merged.seconds
    assert few.memory_bytes <= more.memory_bytes
    times = [needs(tests={"x": Rows(n)})["benchmark"].seconds for n in (100, 200, 400)]
    for short, long in pairwise(times):
        assert 1.5 < long / short < 2.1
    slow = Machine("slow", 4e12, 3e10, 6e-4, 1e7, 80e9)
    for stage, need in needs(machine=slow).items():
        assert need.seconds > 50 * plain[stage].seconds
        assert need.memory_bytes == plain[stage].memory_bytes


def test_a_base_that_does_not_fit_is_fitted_layer_by_layer_and_the_estimate_says_so() -> None:
    small = replace(GPU, memory_bytes=3e9)  # the base has 2 GB
    whole, by_layer = (
        needs(machine=small, gates=gates)["gates"] for gates in ({"by_layer": False}, {})
    )
    assert whole.note == ""
    assert "one layer at a time" in by_layer.note
    inside = 2 * (64 * 64 + 64 * 256) + 4 * 8 * (64 + 64 + 64 + 256)  # weights, and experts
    freed = whole.memory_bytes - by_layer.memory_bytes
    head = 2 * 64 * 999
    assert freed == pytest.approx(inside * 19 / 20 + head)  # of twenty layers one is held
    read = (5 + 2) * 2e9 / small.hash_bytes_per_second
    assert by_layer.seconds == pytest.approx(whole.seconds + read)
    assert needs()["gates"].note == ""
    assert "one layer" in needs(gates={"by_layer": True})["gates"].note
    joint = needs(machine=small, gates={"method": "joint"})["gates"]
    assert joint.note == ""
    assert joint.memory_bytes > 2e9
    # a GPU holds nothing of what a sweep keeps: hidden states, and the outputs of a layer
    on_cpu = needs(machine=replace(GPU, is_cpu=True))["gates"].memory_bytes
    tokens = 64 * (256 + 64)
    assert on_cpu - needs()["gates"].memory_bytes > tokens * 64 * 2


def test_a_quantised_base_takes_less_memory_and_the_same_disk() -> None:
    inside = 64 * 64 + 64 * 256
    found = {quantise: needs(quantise=quantise) for quantise in (None, "8bit", "4bit")}
    for quantise, saved in ((None, 0), ("8bit", inside), ("4bit", inside * (2 - 4.5 / 8))):
        assert found[quantise]["base"] == found[None]["base"]
        for stage in ("gates", "benchmark"):
            less = found[None][stage].memory_bytes - found[quantise][stage].memory_bytes
            assert less == pytest.approx(saved)
    small = replace(GPU, memory_bytes=3e9)  # it is never read by layer
    assert needs(machine=small, quantise="4bit")["gates"].note == ""


def test_experts_in_a_cache_take_its_budget_and_where_gates_are_fitted_a_layer_more() -> None:
    size = 4 * 8 * (64 + 64 + 64 + 256)
    whole, cached, roomy = (needs(expert_cache_bytes=budget) for budget in (None, 1_000, 10 * size))
    assert roomy == whole
    freed = {stage: whole[stage].memory_bytes - cached[stage].memory_bytes for stage in whole}
    assert freed["benchmark"] == pytest.approx(size - 1_000)
    assert freed["gates"] == pytest.approx(size - 1_000 - size / shape().num_layers)
    assert freed["stack"] == 0


def test_as_many_prompts_are_answered_together_as_the_memory_holds() -> None:
    def number(memory_bytes: float, tokens: float = 1000, size: int | str = "auto") -> int:
        settings = BenchmarkSection.model_validate({"batch_size": size})
        return rows_at_once(settings, shape(), tokens, held_bytes=2e9, memory_bytes=memory_bytes)

    assert number(1e9, size=5) == 5  # what a person says stands
    row = working_bytes(shape(), 1, 1000)
    assert 1000 * 10_000 < row < 1000 * 12_000  # the cache is most of it
    for rows, expected in ((0.5, 1), (1.5, 1), (2.1, 2), (15, 8), (17, 16), (1000, 64)):
        assert number((2e9 + rows * row) / 0.9) == expected
    assert number(80e9, tokens=1e6) < number(80e9, tokens=1e5)

    mixed = {"composite": ({"n": 10, "count": 40},)}
    said = needs({"batch_size": "auto"} | mixed)
    assert said["benchmark"].note.endswith("64 prompts at a time, by this memory")
    small = replace(GPU, memory_bytes=3.3e9)
    auto, fixed = (needs({"batch_size": n} | mixed, machine=small) for n in ("auto", 32))
    assert re.match("[0-9]+ to [0-9]+ prompts", auto["benchmark"].note)
    assert auto["benchmark"].memory_bytes < small.memory_bytes < fixed["benchmark"].memory_bytes
    assert auto["benchmark"].seconds > fixed["benchmark"].seconds
    assert fixed["benchmark"].note == ""


def test_a_machine_is_measured_in_the_bases_own_numbers() -> None:
    import torch  # noqa: PLC0415

    found = measure_machine(torch.float32)
    assert found.flops_per_second > found.read_bytes_per_second > 1e6
    assert 1e-7 < found.call_seconds < 1e-2
    assert found.memory_bytes > 1e9


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "< 1 s"), (40, "40 s"), (400, "6.7 min"), (36_000, "10 h"), (400_000, "4.6 d")],
)
def test_durations_are_short(seconds: float, said: str) -> None:
    assert printed.duration(seconds) == said
