"""A base that is not whole is refused: nothing is drawn at random in its place."""

import gc
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import gguf
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Llama4TextConfig
from transformers.integrations import accelerate
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.utils import logging as hf_logging

from meteora.base.config_checks import MAX_LAYERS
from meteora.base.loading import (
    WRITTEN,
    layers_on_disk,
    load_config,
    load_folder,
    load_gguf,
    load_tokenizer,
)
from meteora.base.placement import PlacementError, is_out_of_memory, own_head
from meteora.base.shapes import fingerprint_of, linear_sizes, sizes_of, weight_norms
from meteora.base.sources import SourceError, weights_sha256
from meteora.base.temporary_folder import HERE, temporary_folder
from meteora.checkpoint import resolve
from meteora.checkpoint.manifest import CONFIG, CONFIG_TEXT
from tests.clock import little_work
from tests.conftest import World

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"


@pytest.fixture
def base(build_base: Callable[[str], Path], tmp_path: Path) -> Path:
    """A tiny base that may be damaged."""
    return shutil.copytree(build_base("llama"), tmp_path / "base")


def test_a_fused_checkpoint_is_no_base(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(CONFIG_TEXT)
    with pytest.raises(SourceError, match="is a fused checkpoint, and no base"):
        load_folder(tmp_path)


def test_a_folder_with_an_adapter_or_without_a_config_is_no_base(base: Path) -> None:
    """transformers loads an adapter that lies beside a base into it."""
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"take the adapter's files out"):
        load_folder(base)
    (base / "adapter_config.json").unlink()
    (base / "config.json").unlink()
    with pytest.raises(SourceError, match=r"there is no config\.json in it"):
        load_folder(base)


def test_a_config_that_names_another_one_or_sizes_that_are_none_is_refused(base: Path) -> None:
    written = json.loads((base / "config.json").read_text())
    for key, value, said in (
        ("configuration_files", ["config.4.0.0.json"], "name another config"),
        ("num_key_value_heads", [1, "a"], "num_key_value_heads"),
    ):
        (base / "config.json").write_text(json.dumps(written | {key: value}))
        with pytest.raises(SourceError, match=said):
            load_config(base)


def test_weights_that_are_damaged_or_not_finite_are_named(base: Path) -> None:
    sizes = linear_sizes(base)
    tensors = load_file(base / WEIGHTS)
    key = next(name for name in tensors if "q_proj" in name)
    tensors[key][0, 0] = float("nan")
    save_file(tensors, base / WEIGHTS)
    with pytest.raises(SourceError, match=rf"{WEIGHTS}: {key} holds NaN"):
        weight_norms(base, sizes)
    (base / WEIGHTS).write_bytes((base / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(SourceError, match=f"{WEIGHTS}: it cannot be read"):
        weight_norms(base, sizes)
    (base / WEIGHTS).unlink()
    (base / WEIGHTS).symlink_to(base / "gone")
    with pytest.raises(SourceError, match=f"{WEIGHTS}: it is a link"):
        weights_sha256(base)


@pytest.mark.parametrize("part", ["lm_head.", "model.layers.1.mlp."])
def test_a_base_that_lacks_weights_is_refused(part: str, base: Path) -> None:
    weights = load_file(base / WEIGHTS)
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith(part)}
    assert len(kept) < len(weights)
    save_file(kept, base / WEIGHTS, {"format": "pt"})
    with pytest.raises(SourceError, match=rf"not in its files, such as {part}"):
        load_folder(base)


def test_a_base_without_a_head_of_its_own_lacks_nothing(base: Path) -> None:
    weights = load_file(base / WEIGHTS)
    del weights["lm_head.weight"]
    save_file(weights, base / WEIGHTS, {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    model, _ = load_folder(base)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (WEIGHTS, None, "the model cannot be loaded"),
        (WEIGHTS, slice(0, 5000), "the model cannot be loaded"),
        (TOKENIZER, None, "the tokenizer cannot be loaded"),
        (TOKENIZER, slice(0, 1), "the tokenizer cannot be loaded"),
    ],
)
def test_a_damaged_file_of_a_base_is_refused_in_one_sentence(
    file: str, content: slice | None, says: str, base: Path
) -> None:
    whole = (base / file).read_bytes()
    (base / file).unlink()
    if content is not None:
        (base / file).write_bytes(whole[content])
    with pytest.raises(SourceError, match=rf"{base.name}: {says} .*download or save the base"):
        load_folder(base)


def test_a_base_for_which_memory_is_too_little_is_not_called_damaged(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under `ulimit -v`, when its file cannot be mapped."""
    full = RuntimeError("unable to mmap 5 bytes from file <x>: Cannot allocate memory (12)")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", Mock(side_effect=full))
    with pytest.raises(RuntimeError) as raised:
        load_folder(base)
    assert raised.value is full
    assert is_out_of_memory(full)


@pytest.mark.parametrize("value", ["x", [1], {"a": 1}], ids=repr)
def test_a_setting_of_the_tokenizer_of_another_type_is_refused(value: object, base: Path) -> None:
    """Transformers keeps what it is given, and fails at the first text."""
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": value}))
    with pytest.raises(SourceError, match="the tokenizer cannot be loaded"):
        load_folder(base)


@pytest.mark.parametrize("value", ["x", "", 0.5, [1, "x"], {"a": 1}], ids=repr)
def test_an_end_that_is_no_token_is_refused(value: object, base: Path) -> None:
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": value}))
    with pytest.raises(SourceError, match=r"eos_token_id of its generation config is .*, no token"):
        load_folder(base)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *((name, 1 << 31) for name in ("num_hidden_layers", "n_layer", "decoder_layers")),
        ("num_blocks", 1 << 31),
        ("num_labels", 1 << 31),
        ("attention_types", [[["global"], 2], [["local"], 1 << 31]]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_of_endless_layers_or_labels_is_refused_before_they_are_listed(
    name: str, count: object, base: Path
) -> None:
    path = base / "config.json"
    body = json.loads(path.read_text())
    for endless in (body | {name: count}, body | {"text_config": {name: count}}):
        path.write_text(json.dumps(endless))
        with little_work(), pytest.raises(SourceError, match=rf"\({name} is 2147483648, more than"):
            linear_sizes(base)


def test_layers_that_a_list_counts_are_refused_if_they_are_endless(base: Path) -> None:
    kinds = ["mamba"] * (MAX_LAYERS + 1)
    body = {"model_type": "nemotron_h", "layers_block_type": kinds}
    (base / "config.json").write_text(json.dumps(body))
    with little_work(), pytest.raises(SourceError, match=rf"it has {MAX_LAYERS + 1} layers"):
        linear_sizes(base)


@pytest.mark.parametrize(
    "asked", ["someone/kernels@main", {"text_config": "paged|someone/kernels"}]
)
def test_a_config_that_asks_for_code_of_the_hub_is_refused(asked: object, base: Path) -> None:
    path = base / "config.json"
    body = json.loads(path.read_text())
    for key in ("attn_implementation", "_attn_implementation_internal", "experts_implementation"):
        path.write_text(json.dumps(body | {key: asked}))
        with pytest.raises(SourceError, match=rf"\({key} is .*, code of the Hub; take it out"):
            load_folder(base)
    path.write_text(json.dumps(body | {"attn_implementation": "eager"}))
    assert load_config(base)._attn_implementation == "eager"


def test_weights_of_other_sizes_than_the_config_says_are_refused(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))
    with pytest.raises(SourceError, match="the model cannot be loaded"):
        load_folder(base)


def test_a_base_that_needs_a_package_which_is_not_here_is_refused_with_its_name(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Gemma 3n for images and text needs timm."""

    def needs(*_args: object, **_options: object) -> None:
        raise ImportError("\nIt requires the timm library. Install it:\n`pip install timm`\n")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", needs)
    says = r"base cannot be loaded here: It requires the timm library\. Install it: `pip install"
    with pytest.raises(SourceError, match=says):
        linear_sizes(base)


@pytest.mark.parametrize("where", [{"": "cpu"}, "cpu"])
def test_a_model_that_fits_into_memory_needs_no_temporary_folder(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str | dict[str, str]
) -> None:
    """As in a container whose file system is read-only."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    model, _ = load_folder(base, options={"device_map": where})
    assert model(torch.randint(3, 250, (2, 7))).logits.isfinite().all()


def test_a_mixture_is_read_from_the_disk_and_what_is_written_for_it_goes_with_it(
    build_base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its files hold one tensor for each expert, and the model has one for all."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, ids = build_base("deepseek"), torch.randint(3, 250, (2, 7))
    whole, _ = load_folder(folder)
    read, _ = load_folder(folder, options={"device_map": layers_on_disk(folder, "cpu")})
    assert any(tmp_path.glob("meteora-*/*experts*"))
    with torch.inference_mode():
        assert torch.equal(read(ids).logits, whole(ids).logits)
    del read
    gc.collect()
    assert not any(tmp_path.glob("meteora-*"))


def test_what_a_killed_process_left_is_removed_and_a_living_ones_stays(tmp_path: Path) -> None:
    begin = f"{WRITTEN}{HERE}"
    dead = tmp_path / f"{begin}dead"  # its lock went with its process
    dead.mkdir()
    (dead / "weights").touch()
    os.mkfifo(pipe := tmp_path / f"{begin}pipe")  # by anybody: opened as a file it never ends
    with temporary_folder(tmp_path, WRITTEN) as one:
        pipe.unlink()
        assert not dead.exists()
        (one / "weights").touch()
        with temporary_folder(tmp_path, WRITTEN) as other:
            assert (one / "weights").exists()
            assert other != one
    assert not any(tmp_path.iterdir())


def test_nothing_stays_of_a_folder_in_which_nothing_is_written(
    base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, _ = load_folder(base, options={"device_map": layers_on_disk(base, "cpu")})
    assert not any(tmp_path.glob("meteora-*"))
    assert model(torch.randint(3, 250, (2, 7))).logits.isfinite().all()


def test_a_disk_without_room_for_what_is_written_is_named(
    build_base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(*_args: object) -> None:
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(accelerate, "save_file", full)
    folder = build_base("deepseek")
    with pytest.raises(PlacementError, match=r"/meteora-.*: the disk is full, and weights"):
        load_folder(folder, options={"device_map": layers_on_disk(folder, "cpu")})
    assert not any(tmp_path.glob("meteora-*"))


def test_a_head_is_its_own_if_the_config_does_not_say_that_it_is_shared(base: Path) -> None:
    """As Inkling's does not."""
    model, _ = load_folder(base)
    del model.config.tie_word_embeddings
    assert own_head(model) is model.get_output_embeddings()


@pytest.mark.parametrize("claimed", [1, MAX_LAYERS])
def test_a_fingerprint_is_read_whatever_number_of_layers_a_config_claims(
    claimed: int, base: Path
) -> None:
    config = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": claimed}
    (base / "config.json").write_text(json.dumps(config))
    assert fingerprint_of(base).num_hidden_layers == claimed


@pytest.mark.parametrize("named", [5, {"a": 1}, [], [3], None])
def test_a_config_without_a_name_of_its_architecture_has_that_of_its_kind(
    named: object, base: Path
) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"architectures": named}))
    assert fingerprint_of(base).architecture == "LlamaConfig"


def test_a_router_that_returns_its_choices_too_is_no_linear_layer() -> None:
    config = Llama4TextConfig(hidden_size=8, num_local_experts=4, num_experts_per_tok=2)
    router = Llama4Router(config)
    assert isinstance(router, nn.Linear)
    assert isinstance(router(torch.ones(1, 8)), tuple)
    assert sizes_of(router) is None


def write_gguf(base: Path, out: Path) -> None:
    """A tiny Llama with its weights as they are; its heads are not turned as llama.cpp's are."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config, writer = model.config, gguf.GGUFWriter(out, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokens = json.loads((base / TOKENIZER).read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*list(tokens)[:-1], "ab"])
    writer.add_token_merges(["a b"])  # an array cannot be empty
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for path, tensor in model.state_dict().items():
        name = names.get_name(path, try_suffixes=(".weight",))
        writer.add_tensor(str(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_parsed_once_and_without_a_bar(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_gguf(base, tmp_path / "tiny.gguf")
    parsed: list[str] = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    model, tokenizer = load_gguf(tmp_path / "tiny.gguf")
    assert len(parsed) == 1
    assert not capsys.readouterr().err
    assert gguf.GGUFReader is Counted  # whoever comes next gets its own
    assert tokenizer.convert_tokens_to_ids("ab") == model.config.vocab_size - 1
    down = load_file(base / WEIGHTS)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(model.get_parameter("model.layers.1.mlp.down_proj.weight"), down)


def header(*fields: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields)


def gguf_field(kind: int, value: bytes, name: bytes = b"llama.block_count") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


ENDLESS_HEADERS = {
    "layers": (header(gguf_field(4, b"\xff" * 4)), "block_count is 4294967295; it must be 1 to"),
    "twice": (header(*[gguf_field(4, struct.pack("<I", 2))] * 2), "two of its fields have one"),
    "listed": (header(gguf_field(9, struct.pack("<IQI", 4, 1, 9))), "is no number; it must be 1"),
    "array": (header(gguf_field(9, struct.pack("<IQ", 0, 1 << 60))), "have over 2097152 items"),
    "arrays": (header(gguf_field(9, struct.pack("<IQ", 9, 1 << 20))), "is an array of type 9"),
    "fields": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "1152921504606846976 fields, more"),
    "other order": (b"GGUF" + struct.pack(">IQQ", 3, 1 << 60, 0), "1152921504606846976 tensors"),
    "text": (header(gguf_field(8, b"\xff" * 8)), "it ends inside its header"),
    "type": (header(gguf_field(13, b"")), "is of type 13, which no field has"),
    "name": (header(struct.pack("<Q", 1 << 60)), "the name of a field has"),
    "empty": (b"", "it ends inside its header"),
    "other": (b"PK\3\4", "it is no GGUF file"),
}


@pytest.mark.parametrize("name", ENDLESS_HEADERS)
def test_an_endless_gguf_header_is_refused_before_it_is_listed(name: str, tmp_path: Path) -> None:
    data, why = ENDLESS_HEADERS[name]
    (path := tmp_path / "bad.gguf").write_bytes(data)
    for load in (load_gguf, load_config, load_tokenizer):
        with little_work(), pytest.raises(SourceError, match=why):
            load(path)


def test_a_gguf_base_answers_a_padded_batch_on_every_cache(base: Path, tmp_path: Path) -> None:
    """For a static one, transformers makes the mask by the config of the model, not its layers'."""
    write_gguf(base, tmp_path / "tiny.gguf")
    model: Any = load_gguf(tmp_path / "tiny.gguf")[0]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = torch.arange(5, 17).view(2, 6)
    expected = model.generate(ids, **asked)
    assert torch.equal(model.generate(ids, cache_implementation="static", **asked), expected)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16"])
def test_a_gguf_base_has_the_dtype_that_is_asked_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | str
) -> None:
    write_gguf(world.base, tmp_path / "tiny.gguf")
    monkeypatch.setattr(resolve, "base_files", lambda *_: tmp_path / "tiny.gguf")
    wide, _ = resolve.load_base(world.manifest, None, "auto")
    narrow, _ = resolve.load_base(world.manifest, None, dtype)
    expected = getattr(torch, str(dtype), dtype)
    assert (wide.dtype, narrow.dtype, narrow.config.dtype) == (torch.float32, expected, expected)
    for name, weight in wide.named_parameters():
        assert torch.equal(narrow.get_parameter(name), weight.to(expected))


def test_loads_of_several_threads_leave_messages_as_they_were(
    build_base: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers has one level and one switch for all threads."""
    folder, read, reads = build_base("llama"), AutoConfig.from_pretrained, iter("ab")
    begun = {"a": Event(), "b": Event()}
    a_is_done = Event()

    def overlapping(*args: Any, **kwargs: Any) -> Any:
        begun[name := next(reads)].set()
        assert (begun["b"] if name == "a" else a_is_done).wait(timeout=60)
        assert hf_logging.get_verbosity() == hf_logging.ERROR
        return read(*args, **kwargs)

    def states() -> tuple[int, bool]:
        return hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()

    monkeypatch.setattr(AutoConfig, "from_pretrained", overlapping)
    hf_logging.set_verbosity_warning()
    before = states()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(load_config, folder)
        assert begun["a"].wait(timeout=60)
        second = threads.submit(load_config, folder)
        first.result()
        a_is_done.set()
        second.result()
    assert states() == before
