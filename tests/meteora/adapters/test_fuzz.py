"""For any bytes, `check` gives one verdict, in little time and memory."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meteora.adapters import reader
from tests.clock import little_work
from tests.meteora.adapters.adapter_maker import (
    Q0,
    V0,
    key,
    pair,
    safetensors,
    with_header,
    write_adapter,
)

fuzz = settings(
    max_examples=300,
    deadline=None,  # this test has its own clock
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["LORA", "all-linear", "eva", "pissa", "CAUSAL_LM", Q0, "(a+)+", ".*"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = [
    "peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "bias",
    "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "revision",
    "layers_pattern", "task_type", "base_model_name_or_path", "auto_mapping", "init_lora_weights",
    "lora_parameters", "model", "fine_tune_type", "lora_layers", "enable_lora", "model_class",
]  # fmt: skip
SOUND = pair(Q0) | pair(V0)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes, bytes], None]:
    """Check an adapter of these bytes, and the time and the memory that it takes."""
    folder: Path = write_adapter(tmp_path_factory.mktemp("fuzz"))

    def judge(config: bytes, weights: bytes) -> None:
        (folder / "adapter_config.json").write_bytes(config)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        tracemalloc.start()
        with little_work():
            verdict = reader.check(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert verdict.verdict in ("accept", "warn", "refuse")
        assert (verdict.verdict == "accept") == (not verdict.reasons)
        json.dumps(verdict.to_dict(), allow_nan=False)
        assert peak < len(config) + len(weights) + (16 << 20)

    return judge


@fuzz
@given(config=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=12), values, max_size=8))
def test_any_config_gets_a_verdict(
    config: dict[str, Any], judged: Callable[[bytes, bytes], None]
) -> None:
    for claims in (config, {"peft_type": "LORA", "r": 4} | config):
        judged(json.dumps(claims).encode(), safetensors(SOUND))


@fuzz
@given(config=st.binary(max_size=200), weights=st.binary(max_size=200))
def test_any_bytes_get_a_verdict(
    config: bytes, weights: bytes, judged: Callable[[bytes, bytes], None]
) -> None:
    judged(config, weights)
    judged(b'{"peft_type": "LORA"}', struct.pack("<Q", len(weights)) + weights)


@fuzz
@given(
    header=st.dictionaries(
        st.sampled_from([key(Q0, "A"), key(Q0, "B"), "__metadata__"]) | st.text(max_size=12),
        values
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "I8"]) | values,
                "shape": st.lists(st.integers(-1, 9), max_size=3) | values,
                "data_offsets": st.lists(st.integers(-1, 99), min_size=2, max_size=2) | values,
            }
        ),
        max_size=4,
    ),
    data=st.binary(max_size=99),
)
def test_any_header_gets_a_verdict(
    header: dict[str, Any], data: bytes, judged: Callable[[bytes, bytes], None]
) -> None:
    judged(b'{"peft_type": "LORA"}', with_header(json.dumps(header).encode(), data))


@fuzz
@given(at=st.integers(0, 1_000), value=st.integers(0, 255), cut=st.booleans())
def test_a_sound_file_with_one_byte_changed_gets_a_verdict(
    at: int, value: int, cut: bool, judged: Callable[[bytes, bytes], None]
) -> None:
    data = bytearray(safetensors(SOUND))
    data[at % len(data)] = value
    judged(b'{"peft_type": "LORA", "r": 4}', bytes(data[: at if cut else len(data)]))


def many_keys(size: int, value: str = "1") -> bytes:
    """A flat object of as many keys as fit into `size` bytes."""
    return (
        "{" + ",".join(f'"{i:x}":{value}' for i in range(size // (8 + len(value)))) + "}"
    ).encode()


LORA = b'{"peft_type": "LORA", "r": 4, '
MOST_KEYS = many_keys(3 << 19)
LARGEST: dict[str, tuple[bytes, bytes]] = {
    "too_many_lists": (LORA + b'"a": [' + b"[]," * 650_000 + b"[]]}", b""),
    "lists": (LORA + b'"a": [' + b"[]," * 49_000 + b"[]]}", b""),
    "unknown_keys": (LORA + MOST_KEYS[1:], b""),
    "unset_keys": (LORA + many_keys(3 << 19, "null")[1:], b""),
    "targets": (
        LORA + b'"target_modules": ' + json.dumps([*map(hex, range(190_000))]).encode() + b"}",
        b"",
    ),
    "patterns": (
        LORA
        + b'"rank_pattern": '
        + json.dumps({"(ab|cd)" * 280 + hex(i): 1 for i in range(900)}).encode()
        + b"}",
        b"",
    ),
    "header_keys": (LORA[:-2] + b"}", with_header(many_keys(7 << 19))),
    "metadata": (
        LORA[:-2] + b"}",
        with_header(b'{"__metadata__":' + many_keys(7 << 19, '""') + b"}"),
    ),
}


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_that_is_read_costs_little_too(name: str, tmp_path: Path) -> None:
    """What hypothesis makes is small; these reach the limits on size."""
    config, weights = LARGEST[name]
    folder = write_adapter(tmp_path, weights or safetensors(SOUND))
    (folder / "adapter_config.json").write_bytes(config)
    with little_work():
        assert reader.check(folder).reasons
    tracemalloc.start()
    reader.check(folder)
    assert tracemalloc.get_traced_memory()[1] < len(config) + len(weights) + (64 << 20)
    tracemalloc.stop()
