"""Files that are no adapters, or that were made to break their reader."""

import json
import os
import pickle
import struct
import sys
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from meteora.adapters import reader
from meteora.adapters.tensors import sort_tensors
from meteora.untrusted.findings import AdapterError
from meteora.untrusted.safetensors_header import HeaderError, read_header
from tests.clock import little_work
from tests.meteora.adapters.adapter_maker import (
    Q0,
    Tensors,
    key,
    pair,
    safetensors,
    with_header,
    write_adapter,
)


def codes(path: Path) -> dict[str, str]:
    return {reason.code: reason.message for reason in reader.check(path).reasons}


TOO_DEEP = "nested too deeply" if sys.version_info < (3, 14) else "not JSON"
"""Python 3.14 reads 40,000 open lists to their end, which is missing."""
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
OTHER_FILES = {
    "lfs_pointer": LFS,
    "apple_double": b"\x00\x05\x16\x07\x00\x02",
    "html": b"\n <!DOCTYPE html><title>Log in</title>",
    "html xml": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "gguf": b"GGUF\x03\x00\x00\x00",
    "empty": b"",
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_what_lies_in_place_of_a_file_is_called_by_its_name(name: str, tmp_path: Path) -> None:
    code = name.split(maxsplit=1)[0]
    folder = write_adapter(tmp_path / "weights", OTHER_FILES[name])
    assert code in codes(folder)
    folder = write_adapter(tmp_path / "config")
    (folder / "adapter_config.json").write_bytes(OTHER_FILES[name])
    assert code in codes(folder)


@pytest.mark.parametrize("data", [*(pickle.dumps({}, n) for n in range(2, 6)), b"PK\x03\x04zip"])
def test_a_pickle_under_another_name_is_not_read(data: bytes, tmp_path: Path) -> None:
    assert "save_pretrained" in codes(write_adapter(tmp_path, data))["pickle"]


@pytest.mark.parametrize("size", [0x0280, 0x0380, 0x0480, 0x0580, 0x028020])
def test_a_header_whose_size_looks_like_a_pickle_is_read(size: int, tmp_path: Path) -> None:
    """One file in two thousand has such a size."""
    data = safetensors(pair(Q0))
    header = 8 + int.from_bytes(data[:8], "little")
    data = with_header(data[8:header].ljust(size), data[header:])
    assert codes(write_adapter(tmp_path, data, target_modules=["q_proj"])) == {}


class Bomb:
    def __reduce__(self) -> Any:
        return os._exit, (1,)


@pytest.mark.parametrize("name", ["adapter_model.bin", "weights.pt", "x.ckpt"])
def test_a_pickle_is_refused_unopened_with_the_way_out(name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    assert name in codes(folder)["pickle"]
    assert "safetensors" in codes(folder / name)["pickle"]


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    (write_adapter(tmp_path) / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert codes(tmp_path) == {}


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"base_model": "lerobot/smolvla"}, "stub"),
        ({"rank": 8}, "no_peft_type"),
        ({"model_class": "X", "model_name": "x", "config": {}}, "adapterhub"),
        ({"lora_layers": 4}, "mlx_fine_tune_type"),
        ({}, "no_peft_type"),
    ],
)
def test_configs_of_others_are_called_by_their_name(
    config: dict[str, Any], code: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert code in codes(folder)


@pytest.mark.parametrize(
    "name",
    [
        "unet.down_blocks.0.attn.to_k.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_down_blocks_0_attn.lora_down.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_lora_of_an_image_model_is_called_so(name: str, tmp_path: Path) -> None:
    """With a config of PEFT's or without any, and by the name that diffusers gives its file."""
    folder = write_adapter(tmp_path / "both", safetensors({name: ("F32", (4, 8), 1.0)}))
    assert name in codes(folder)["diffusers"]
    (folder / "adapter_config.json").unlink()
    assert name in codes(folder)["diffusers"]
    (folder / "adapter_model.safetensors").rename(folder / "pytorch_lora_weights.safetensors")
    assert "image model" in codes(folder)["diffusers"]


@pytest.mark.parametrize(
    ("text", "clause"),
    [
        (b'{"peft_type": "LORA", "r": 8, "r": 4}', "'r' is given twice"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not a number"),
        (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', "-Infinity is not a number"),
        (b'{"peft_type": "LORA"', "not JSON"),
        (b'{"peft_type": "LORA",}', "not JSON"),
        (b'["peft_type"]', "a list, not an object"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"peft_type": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"[" * 40_000, TOO_DEEP),
        (b'{"a": ' + b"[" * 100_000, "more than 50000 lists and tables"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b" " * (3 << 20), "more than"),
    ],
    ids=range(12),
)
def test_a_config_with_no_single_meaning_is_refused(
    text: bytes, clause: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path)
    (folder / "adapter_config.json").write_bytes(text)
    (message, *_) = codes(folder).values()
    assert clause in message


def entry(name: str = key(Q0, "A"), **changes: Any) -> bytes:
    body = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes
    return json.dumps({name: body}).encode()


PLAIN, DATA = entry(), b"d" * 16
BAD_HEADERS = {
    "seven_bytes": b"1234567",
    "length_2_63": struct.pack("<Q", 1 << 63) + b"{}",
    "longer_than_file": struct.pack("<Q", 100) + b"{}",
    "no_length": struct.pack("<Q", 0),
    "not_json": with_header(b"hello"),
    "array": with_header(b"[]"),
    "byte_order_mark": with_header(b"\xef\xbb\xbf{}"),
    "leading_space": with_header(b" " + PLAIN, DATA),
    "nul_padding": with_header(PLAIN + b"\0", DATA),
    "not_utf8": with_header(b'{"\xff": 1}'),
    "truncated_data": with_header(PLAIN, DATA[:-1]),
    "trailing_data": with_header(PLAIN, DATA + b"x"),
    "hole_at_start": with_header(entry(data_offsets=[4, 20]), b"d" * 20),
    "end_before_begin": with_header(entry(data_offsets=[16, 0]), DATA),
    "shape_of_other_size": with_header(entry(shape=[2, 3]), DATA),
    "shape_too_large": with_header(entry(shape=[1 << 40, 1 << 40]), DATA),
    "negative_shape": with_header(entry(shape=[-2, -2]), DATA),
    "shape_of_floats": with_header(entry(shape=[2.0, 2.0]), DATA),
    "shape_of_truths": with_header(entry(shape=[True, 4]), DATA),
    "thousand_dimensions": with_header(entry(shape=[1] * 1_000 + [4]), DATA),
    "no_elements": with_header(entry(shape=[0, 1 << 20], data_offsets=[0, 0])),
    "unknown_dtype": with_header(entry(dtype="F4"), DATA),
    "dtype_of_another_type": with_header(entry(dtype=[1]), DATA),
    "extra_field": with_header(entry(comment="x"), DATA),
    "no_table": with_header(b'{"a": 3}'),
    "path_as_name": with_header(entry("../../etc/passwd"), DATA),
    "nul_in_name": with_header(entry("a\0b"), DATA),
    "empty_name": with_header(entry(""), DATA),
    "long_name": with_header(entry("a" * 600), DATA),
    "name_twice": with_header(PLAIN[:-1] + b"," + PLAIN[1:], DATA),
    "overlap": with_header(PLAIN[:-1] + b"," + entry("b", data_offsets=[8, 24])[1:], b"d" * 24),
    "metadata_of_numbers": with_header(b'{"__metadata__": {"a": 1}}'),
    "deep": with_header(b'{"a":' + b"[" * 30_000),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_header_that_is_not_sound_is_refused_at_once(name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, BAD_HEADERS[name])
    with little_work():
        found = codes(folder)
    assert "safetensors" in found
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        reader.read(folder)


def test_a_header_of_a_million_tensors_costs_nothing(tmp_path: Path) -> None:
    """The library takes half a minute and gigabytes for it, inside its own limit."""
    one = '"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(one % i for i in range(1_000_000)) + "}").encode()
    for limited in (header, header[: 3 << 20]):
        folder = write_adapter(tmp_path, with_header(limited))
        tracemalloc.start()
        with little_work():
            assert "safetensors" in codes(folder)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("key_name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(a+)+x", "(.*)*(.*)*(.*)*y", "((a|a|a)*)*b", "(.*a){60}"])
def test_a_pattern_made_to_stall_does_not(key_name: str, pattern: str, tmp_path: Path) -> None:
    paths = [f"model.layers.{i}.{'a' * 200}" for i in range(200)]
    tensors = {k: v for path in paths for k, v in pair(path, r=1, size=(1, 1)).items()}
    table = {f"{pattern}{i}": 1 for i in range(20)}
    folder = write_adapter(tmp_path, tensors, r=1, **{key_name: table})
    with little_work():
        codes(folder)  # `re` takes years


def test_an_adapter_of_hundreds_of_patterns_is_read_in_time(tmp_path: Path) -> None:
    """EVA writes the full path of each module into both tables."""
    paths = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(80) for n in "qkvo"]
    tensors = {k: v for path in paths for k, v in pair(path, r=1, size=(1, 1)).items()}
    table = dict.fromkeys(paths, 1)
    with little_work():
        found = reader.read(
            write_adapter(
                tmp_path, tensors, rank_pattern=table, alpha_pattern=table, target_modules=None
            )
        )
    assert {module.scaling for module in found.spec.modules} == {1.0}


MANY = [f"module{i}" for i in range(100_000)]
NAMES: dict[str, dict[str, Any]] = {
    "a path of 500,000 parts": {"target_modules": ["q_proj", "a" + ".a" * 500_000]},
    "an excluded one": {"exclude_modules": ["a" + ".a" * 500_000]},
    "two long lists": {"target_modules": MANY[::2], "exclude_modules": MANY[1::2]},
}


@pytest.mark.parametrize("name", NAMES)
def test_lists_of_modules_have_bounds(name: str, tmp_path: Path) -> None:
    """A path has as many endings as parts, and names of two lists are compared with each other."""
    with little_work():
        found = codes(write_adapter(tmp_path, **NAMES[name]))
    assert found.keys() == NAMES[name].keys()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_regular_file_is_not_opened(name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / name).unlink()
    os.mkfifo(folder / name)  # opening it would never return
    assert "not_a_file" in codes(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_to_a_file_that_is_not_here_is_called_so(name: str, tmp_path: Path) -> None:
    """As a copy of a snapshot in the Hub's cache has them, without the blobs beside it."""
    folder = write_adapter(tmp_path)
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123")
    for path in (folder, folder / name, folder / "adapter_config.json"):
        assert codes(path).keys() == {"broken_link"}
        assert codes(path)["broken_link"].startswith(f"{name} is a link")


def test_weights_that_are_all_hole_are_not_read(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    os.truncate(folder / "adapter_model.safetensors", 1 << 40)
    with little_work():
        assert "has 1099511627776 bytes, more than" in codes(folder)["weights_size"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    assert "missing" in codes(tmp_path / "nowhere")
    assert {"no_config", "no_weights"} <= codes(tmp_path).keys()
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "training_args.bin").write_bytes(b"PK")  # beside weights, and none
    assert "it has model.safetensors" in codes(tmp_path)["no_weights"]
    (tmp_path / "meteora.json").touch()
    assert "it is a fused checkpoint already" in codes(tmp_path)["fused"]
    write_adapter(tmp_path / "several" / "one")
    assert "its folders; say which: one" in codes(tmp_path / "several")["no_weights"]
    folder = write_adapter(tmp_path / "config")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="no_weights"):
        reader.read(folder)


def test_one_bad_adapter_names_all_that_is_wrong(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, pair(Q0, r=2), use_dora=True, r=4, lora_alpha="8")
    assert {"dora", "alpha", "rank_mismatch"} <= codes(folder).keys()


def test_thousands_of_bad_tensors_make_a_short_message(tmp_path: Path) -> None:
    tensors = {k: v for i in range(2_000) for k, v in pair(f"m.{i}.x", r=2, size=(1, 1)).items()}
    with pytest.raises(AdapterError) as error:
        reader.read(write_adapter(tmp_path, tensors))
    assert len(str(error.value)) < 1_000


def test_thousands_of_bad_entries_in_a_config_do_not_either(tmp_path: Path) -> None:
    table = {f"module{i}": -i for i in range(15_000)}
    with little_work():
        assert len(reader.check(write_adapter(tmp_path, rank_pattern=table)).reasons) < 10


def test_terminal_codes_in_names_are_not_shown(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, peft_type="\x1b[2J\nevil", **{"\x1b[31mkey": 1})
    assert "\x1b" not in "".join(codes(folder).values())


@pytest.mark.parametrize("inputs", [8, 40_000], ids=["buffered", "large"])
def test_a_file_that_shrinks_while_it_is_read_is_an_error(
    inputs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path, safetensors(pair(Q0, size=(inputs, 6))))
    weights = folder / "adapter_model.safetensors"
    real = sort_tensors

    def cut_and_sort(*arguments: Any) -> Any:
        os.truncate(weights, weights.stat().st_size - 64)
        return real(*arguments)

    monkeypatch.setattr(reader, "sort_tensors", cut_and_sort)
    assert "truncated" in codes(folder)


@pytest.mark.parametrize("left", [7, 20])
def test_a_file_that_shrinks_before_its_header_is_read_is_an_error(left: int) -> None:
    whole = safetensors(pair(Q0))
    with pytest.raises(HeaderError, match="it was cut short while it was read"):
        read_header(BytesIO(whole[:left]), len(whole))


def test_a_rank_that_no_checkpoint_can_hold_is_refused(tmp_path: Path) -> None:
    """The config says another rank, which alone would be a warning."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    tensors: Tensors = {
        f"{name}_A.weight": ("F32", (5000, 8), 1.0),
        f"{name}_B.weight": ("F32", (8, 5000), 1.0),
    }
    folder = write_adapter(tmp_path, safetensors(tensors), r=4)
    assert "is 5000; it must be 1 to 4096" in codes(folder)["rank"]


@pytest.mark.parametrize("value", ["8", 8.0, True])
def test_what_only_looks_like_a_rank_is_told_from_one(value: Any, tmp_path: Path) -> None:
    said = codes(write_adapter(tmp_path, r=value, lora_alpha="8"))
    assert "it must be 1 to 4096, a whole number" in said["rank"]
    assert said["rank"].endswith(" without quotes") == isinstance(value, str)
    assert said["alpha"].endswith(" without quotes")
