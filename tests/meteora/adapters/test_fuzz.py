"""For any bytes, `check` gives one verdict, in little time and memory."""

from __future__ import annotations

import contextlib
import json
import random
import re
import resource
import struct
import tracemalloc
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from meteora.adapters import reader
from meteora.untrusted.patterns import Budget, PatternError, matching
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

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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


pieces = st.sampled_from(
    [
        "a",
        "b",
        r"\.",
        ".",
        "a*",
        "b+?",
        "(a|b.)",
        "(?:ab)?",
        "[ab]",
        "[^a-b.]",
        r"\d{1,2}",
        "^",
        "$",
        "|",
    ]
)


names = st.lists(st.text("ab.12", max_size=8), min_size=1, max_size=4)


@settings(fuzz, max_examples=1_000)
@given(source=st.lists(pieces, max_size=6).map("".join), names=names)
def test_patterns_match_what_re_matches(source: str, names: list[str]) -> None:
    whole = {name for name in names if re.fullmatch(source, name)}
    part = {name for name in names if re.match(rf"(.*\.)?({source})$", name)}
    assert matching(source, names, Budget()) == whole
    assert matching(source, names, Budget(), anywhere=True) == part


def test_the_keys_that_an_export_of_a_large_model_writes_are_within_the_budget() -> None:
    """A rank and an alpha of its own for each of 560 modules of a 70B model."""
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(80) for part in "qkvogud"]
    budget = Budget()
    for name in names * 2:
        assert matching(f"^{re.escape(name)}", names, budget, anywhere=True) == {name}


@settings(fuzz, max_examples=1_000)
@example(source=r"[\:-2]", names=[""])
@example(source=r"^a\.b", names=["a.b", "aab", "b.a.b"])
@example(source=r"[]\S--[]", names=["a"])
@example(source="a{,2}", names=["a", "aa"])
@example(source="a{02}", names=["aa"])
@example(source="[[:alpha:]]", names=["a"])
@example(source="a)(b", names=["ab"])
@example(source="^*", names=[""])
@given(source=st.text("ab.*+?()[]{}|^$\\,20-:w\n\ud800é", max_size=12), names=names)
def test_any_pattern_is_matched_as_re_does_or_not_at_all(source: str, names: list[str]) -> None:
    try:
        found = matching(source, names, Budget())
    except PatternError:
        return
    with warnings.catch_warnings():  # `[[` and the like may mean more in a later Python
        warnings.simplefilter("ignore", FutureWarning)
        assert found == {name for name in names if re.fullmatch(source, name)}


STALLING = {
    "groups": ["(a+)+x", "((a|a|a)*)*b"],
    "stars": ["(.*)*(.*)*(.*)*y"],
    "counts": ["(.*a){60}", "(.*a.{20}b){20}"],
    "exponential": ["(a|b)*a(a|b){40}", ".*a.{200}b.*"],
    "dots": ["." * 90, "x." * 40],
    "every_name": [".*"],
    "deep": ["(" * 900 + "a" + ")" * 900],
}


@pytest.mark.parametrize("kind", STALLING)
def test_thousands_of_patterns_made_to_stall_do_not(kind: str) -> None:
    """All patterns of one config have one budget; without it these would take hours."""
    draw = random.Random(0)
    names = ["".join(draw.choices("ab.x", [8, 8, 1, 1], k=200)) for _ in range(2_000)]
    budget = Budget()

    def match_all() -> None:
        for source in STALLING[kind] * 100_000:
            matching(source, names, budget, anywhere=True)

    with little_work(), pytest.raises(PatternError, match="too long"):
        match_all()


@pytest.mark.parametrize("source", ["a{999}" * 285, "(a{9}){999}" * 99, "((a{9}){99}){9}", "é" * 9])
def test_a_pattern_of_any_size_takes_little_memory(source: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(PatternError):
        matching(source, ["a" * 500], Budget())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KB
