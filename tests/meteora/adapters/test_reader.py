"""Adapters are read as PEFT means them, or refused with a reason."""

import errno
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from meteora.adapters import reader
from meteora.adapters.compatibility import (
    IncompatibleAdaptersError,
    check_stackable,
    fit_to_base,
    stack_bytes,
)
from meteora.adapters.tensors import AdapterTensors
from meteora.artifacts import AdapterModule
from meteora.untrusted.findings import AdapterError
from tests.meteora.adapters.adapter_maker import (
    Q0,
    Q1,
    V0,
    V1,
    Tensors,
    key,
    pair,
    safetensors,
    write_adapter,
    write_mlx,
)


def codes(folder: Path, **policy: Any) -> dict[str, str]:
    """Code and message of everything that `check` has to say."""
    return {reason.code: reason.message for reason in reader.check(folder, **policy).reasons}


def module(path: str, lora_alpha: float = 8.0, scaling: float = 2.0) -> AdapterModule:
    return AdapterModule(path, 8, 6, 4, lora_alpha, scaling)


def test_a_sound_adapter_is_accepted_without_a_word(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    found = reader.read(folder)
    assert found.reasons == ()
    assert found.spec.modules == tuple(module(path) for path in (Q0, V0, Q1, V1))
    assert found.tensors[Q0] == AdapterTensors(key(Q0, "A"), key(Q0, "B"), transposed=False)
    data = found.weights.read_bytes()
    assert found.spec.weights_sha256 == hashlib.sha256(data).hexdigest()
    assert reader.check(folder).verdict == "accept"


def test_a_verdict_is_json_with_the_facts(tmp_path: Path) -> None:
    verdict = reader.check(write_adapter(tmp_path)).to_dict()
    body = json.loads(json.dumps(verdict))
    expected = {"verdict": "accept", "reasons": [], "r_min": 4, "r_max": 4, "num_modules": 4}
    assert expected.items() <= body.items()
    assert body["judged_by"] == "tensors"


def test_a_config_alone_is_judged_by_what_it_claims(tmp_path: Path) -> None:
    write_adapter(tmp_path, bias="all", modules_to_save=["lm_head"])
    config = (tmp_path / "adapter_config.json").rename(tmp_path / "claims.json")
    verdict = reader.check(config)
    assert (verdict.verdict, verdict.facts["judged_by"]) == ("refuse", "claims")
    assert codes(config)["modules_to_save"] == "it replaces whole modules of the base: lm_head"
    found = reader.check(config, modules_to_save="strip").reasons
    assert [reason.code for reason in found] == ["bias", "modules_to_save"]
    with pytest.raises(AdapterError, match="there are no weights beside this config"):
        reader.read(
            write_adapter(tmp_path / "sound").joinpath("adapter_config.json").rename(config)
        )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_either_file_stands_for_its_folder(name: str, tmp_path: Path) -> None:
    verdict = reader.check(write_adapter(tmp_path) / name)
    assert (verdict.verdict, verdict.facts["judged_by"]) == ("accept", "tensors")


def test_a_file_that_cannot_be_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_adapter(tmp_path)
    denied = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(reader, "read_claim", Mock(side_effect=denied))
    for refuse in (reader.read, lambda folder: reader.check_config(folder, "here")):
        with pytest.raises(AdapterError, match="it cannot be read: Permission denied"):
            refuse(folder)
    assert codes(folder).keys() == {"unreadable"}


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 12.5}, 12.5 / 4),
        ({"use_rslora": True}, 8 / math.sqrt(4)),
        ({"alpha_pattern": {"q_proj": 3}}, 3 / 4),
        ({"alpha_pattern": {r".*\.layers\.0\..*(q|v)_proj": 3, "q_proj": 5}}, 3 / 4),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 5}}, 5 / 4),
        ({"alpha_pattern": {"proj": 3}}, 8 / 4),
        ({"alpha_pattern": {r"^model\.layers\.0": 3}}, 8 / 4),
    ],
    ids=["float", "rslora", "name", "pattern_first", "first_that_matches", "part", "prefix"],
)
def test_scaling_follows_pefts_rule(config: dict[str, Any], scaling: float, tmp_path: Path) -> None:
    found = reader.read(write_adapter(tmp_path, **config))
    assert {m.path: m.scaling for m in found.spec.modules}[Q0] == scaling


def test_ranks_are_the_tensors_own(tmp_path: Path) -> None:
    tensors = pair(Q0, r=2) | pair(V0, r=4)
    found = reader.read(write_adapter(tmp_path, tensors, rank_pattern={r".*q_proj": 2}))
    assert [(m.path, m.r, m.scaling) for m in found.spec.modules] == [(Q0, 2, 4.0), (V0, 4, 2.0)]


@pytest.mark.parametrize("pattern", [r"(?=q)q_proj", r"(a)\1", "(((", r"\Bq_proj", "q" * 2_001])
def test_a_pattern_that_cannot_be_matched_is_fatal_only_where_it_counts(
    pattern: str, tmp_path: Path
) -> None:
    """The tensors say what r is; nothing but the config says what alpha is."""
    assert set(codes(write_adapter(tmp_path, rank_pattern={pattern: 4}))) == {"pattern_unchecked"}
    assert set(codes(write_adapter(tmp_path, alpha_pattern={pattern: 4}))) == {"pattern"}


BAD_TENSORS: dict[str, tuple[Tensors, str, str]] = {
    "rank_of_the_config": (pair(Q0, r=8), "rank_mismatch", Q0),
    "b_missing": ({key(Q0, "A"): ("F32", (4, 8), 1.0)}, "missing_factor", f"{Q0}.lora_A"),
    "a_and_b_swapped": (
        {key(Q0, "A"): ("F32", (8, 4), 1.0), key(Q0, "B"): ("F32", (4, 6), 1.0)},
        "shape",
        "do not multiply",
    ),
    "b_transposed": (
        {key(Q0, "A"): ("F32", (4, 8), 1.0), key(Q0, "B"): ("F32", (4, 6), 1.0)},
        "shape",
        "do not multiply",
    ),
    "not_a_matrix": (
        {key(Q0, "A"): ("F32", (2, 2, 8), 1.0), key(Q0, "B"): ("F32", (6, 4), 1.0)},
        "not_linear",
        "these are no matrices",
    ),
    "f64": (pair(Q0, dtype="F64"), "dtype", "F64"),
    "i32": (pair(Q0, dtype="I32", value=1), "dtype", "I32"),
    "bool": (pair(Q0, dtype="BOOL", value=1), "dtype", "BOOL"),
    "no_factor": ({"something.weight": ("F32", (2, 2), 1.0)}, "no_lora", "none of its 1 tensors"),
    "no_tensor": ({}, "no_lora", "none of its 0 tensors"),
    "norm": (pair(Q0) | {"model.norm.weight": ("F32", (8,), 1.0)}, "unknown_tensors", "norm"),
    "bias": (pair(Q0) | {f"{Q0}.bias": ("F32", (6,), 1.0)}, "bias", Q0),
    "dora": (pair(Q0) | {f"{Q0}.lora_magnitude_vector": ("F32", (6,), 1.0)}, "dora", Q0),
    "lora_bias": (pair(Q0) | {f"{Q0}.lora_B.bias": ("F32", (6,), 1.0)}, "lora_bias", Q0),
    "experts": (
        pair("model.layers.0.mlp.experts.base_layer"),
        "target_parameters",
        "fused experts",
    ),
    "trainable_tokens": (
        pair(Q0) | {"model.embed_tokens.token_adapter.trainable_tokens_delta": ("F32", (1, 8), 1)},
        "trainable_tokens",
        "embedding",
    ),
    "two_names": (
        pair(Q0) | {f"{Q0}.lora_A.other.weight": ("F32", (4, 8), 1.0)},
        "several_adapters",
        "other",
    ),
    "prefix_twice": (
        pair(Q0) | {f"{Q0}.lora_A.weight": ("F32", (4, 8), 1.0)},
        "duplicate_module",
        Q0,
    ),
    "nan": (pair(Q0, value=math.nan), "not_finite", key(Q0, "A")),
    "inf_f16": (pair(Q0, value=math.inf, dtype="F16"), "not_finite", key(Q0, "A")),
    "inf_bf16": (pair(Q0, value=-math.inf, dtype="BF16"), "not_finite", key(Q0, "A")),
    "zeros": (pair(Q0, value=0.0), "no_op", "before any training"),
}


@pytest.mark.parametrize(("tensors", "code", "named"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_are_no_sound_lora_are_refused(
    tensors: Tensors, code: str, named: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, tensors)
    assert named in codes(folder)[code]
    assert codes(folder)[code].count("(F64)") <= 1  # A and B of one module are one
    with pytest.raises(AdapterError) as error:
        reader.read(folder)
    assert code in {reason.code for reason in error.value.reasons}


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": "lora"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora"),
        ({"use_qalora": True}, "qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "bdlora"),
        ({"kasa_config": {"beta": 1}}, "kasa"),
        ({"velora_config": {"x": 1}}, "velora"),
        ({"monteclora_config": {"x": 1}}, "monteclora"),
        ({"arrow_config": {"top_k": 3}}, "arrow"),
        ({"megatron_config": {"x": 1}}, "megatron"),
        ({"enable_lora": [True, False]}, "enable_lora"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_changes_base"),
        ({"init_lora_weights": "OLoRA"}, "init_changes_base"),
        ({"init_lora_weights": "loftq"}, "init_changes_base"),
        ({"init_lora_weights": "corda"}, "init_changes_base"),
        ({"init_lora_weights": "lora_ga_2"}, "init_changes_base"),
        ({"init_lora_weights": "next_years"}, "init_unknown"),
        ({"init_lora_weights": 1}, "init_unknown"),
        ({"some_future_flag": {"x": 1}}, "unknown_key"),
        ({"trust_remote_code": True}, "unknown_key"),
        ({"bias": "some"}, "bias"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"task_type": "DANCING"}, "task_type"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "layers"),
        ({"layers_pattern": "layers"}, "layers"),
        ({"target_modules": 7}, "target_modules"),
        ({"exclude_modules": 7}, "exclude_modules"),
        ({"target_modules": "(" * 4_000}, "pattern"),
        ({"auto_mapping": {"parent_library": "diffusers.models.unet"}}, "diffusers"),
        ({"auto_mapping": {"base_model_class": "WhisperForConditionalGeneration"}}, "base_class"),
        ({"auto_mapping": {"base_model_class": "PeftModelForFeatureExtraction"}}, "base_class"),
        ({"auto_mapping": "os.system"}, "auto_mapping"),
        *(({"r": value}, "rank") for value in (0, -1, "8", 2.0, True, 2**31, None)),
        *(({"lora_alpha": value}, "alpha") for value in (0, -1, "16", 1e30, 10**400, True, [])),
        ({"lora_alpha": 1e-30}, "alpha"),
        ({"rank_pattern": {"q_proj": 0}}, "rank"),
        ({"alpha_pattern": {"q_proj": "1"}}, "alpha"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"modules_to_save": "head"}, "modules_to_save"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_configs_that_mean_something_else_are_refused(
    config: dict[str, Any], code: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, **config)
    assert code in codes(folder)
    assert reader.check(folder).verdict == "refuse"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"base_model_name_or_path": None}, "base_unnamed"),
        ({"base_model_name_or_path": "/home/me/llama"}, "base_local_path"),
        ({"base_model_name_or_path": "../../etc/passwd"}, "base_local_path"),
        ({"base_model_name_or_path": "file:///etc/passwd"}, "base_local_path"),
        ({"base_model_name_or_path": "https://evil.example/base"}, "base_local_path"),
        ({"base_model_name_or_path": "a/b\x1b[2J"}, "base_unreadable"),
        ({"base_model_name_or_path": ["a/b"]}, "base_unreadable"),
        ({"base_model_name_or_path": "unsloth/x-bnb-4bit"}, "base_quantized"),
        ({"base_model_name_or_path": "x" * 10_000}, "base_unreadable"),
        ({"task_type": None}, "task_type"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type"),
        ({"new_key": None}, "unknown_key"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "idle_target"),
        ({"target_modules": ["q_proj"]}, "untargeted"),
        ({"target_modules": r".*\.q_proj"}, "untargeted"),
        ({"layers_to_transform": [0]}, "untargeted"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "untargeted"),
        ({"exclude_modules": r".*\.1\..*"}, "untargeted"),
        ({"exclude_modules": "(?!x).*"}, "pattern_unchecked"),
        ({"target_modules": "(?!x).*"}, "pattern_unchecked"),
        ({"lora_alpha": 8_000}, "large_scaling"),
        ({"modules_to_save": ["classifier"]}, "modules_to_save"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_what_a_person_should_know_is_a_warning(
    config: dict[str, Any], code: str, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path, **config)
    assert set(codes(folder)) == {code}
    assert reader.check(folder).verdict == "warn"
    assert [reason.code for reason in reader.read(folder).reasons] == [code]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": [Q0, Q1, "v_proj"]},
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"},
        {"layers_to_transform": [0, 1]},
        {"exclude_modules": ".*lm_head"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        *({"init_lora_weights": init} for init in ("gaussian", "Gaussian", "mica", False, None)),
        {"merge_weights": False, "enable_lora": None},
        {"auto_mapping": {}},
        {"auto_mapping": {"base_model_class": "GPT2LMHeadModel"}},
        {"auto_mapping": {"base_model_class": "PeftModel", "parent_library": "peft.peft_model"}},
        {"auto_mapping": {"parent_library": "peft", "base_model_class": "PeftMixedModel"}},
        {"modules_to_save": [], "peft_version": "0.21.2", "inference_mode": True},
        {"fan_in_fan_out": True},
    ],
    ids=lambda config: json.dumps(config)[:40],
)
def test_what_makes_no_difference_is_accepted(config: dict[str, Any], tmp_path: Path) -> None:
    assert codes(write_adapter(tmp_path, **config)) == {}


@pytest.mark.parametrize(
    "extra",
    ["model.embed_tokens.weight", "lm_head.weight", "score.weight", "lm_head.base_layer.weight"],
)
def test_whole_modules_are_refused_or_left_out_and_listed(extra: str, tmp_path: Path) -> None:
    name = f"base_model.model.{extra}"
    folder = write_adapter(tmp_path, pair(Q0) | pair(V0) | {name: ("F32", (9, 8), 1.0)})
    assert extra in codes(folder)["modules_to_save"]
    found = reader.read(folder, modules_to_save="strip")
    assert found.spec.stripped == (name,)
    assert [reason.code for reason in found.reasons] == ["stripped"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_tied_to_the_embedding_is_targeted_with_it(
    tied: bool, tmp_path: Path
) -> None:
    """PEFT writes the embedding in the head's place into its targets, and the LoRA of both."""
    embedding = {
        f"base_model.model.model.embed_tokens.lora_embedding_{factor}": ("F32", shape, 1.0)
        for factor, shape in (("A", (4, 9)), ("B", (8, 4)))
    }
    folder = write_adapter(
        tmp_path,
        pair(Q0) | pair("lm_head") | embedding,
        target_modules=["q_proj", "model.embed_tokens"],
        ensure_weight_tying=tied,
    )
    found = reader.read(folder, modules_to_save="strip")
    assert found.spec.stripped == tuple(embedding)
    assert [reason.code for reason in found.reasons] == ["stripped", *["untargeted"] * (not tied)]


@pytest.mark.parametrize("name", ["model.embed_tokens", "backbone.embeddings"])  # or Mamba's
def test_lora_on_an_embedding_is_no_linear_layer(name: str, tmp_path: Path) -> None:
    stem = f"base_model.model.{name}"
    embedding: Tensors = {
        f"{stem}.base_layer.weight": ("F32", (9, 8), 1.0),
        f"{stem}.lora_embedding_A": ("F32", (4, 9), 1.0),
        f"{stem}.lora_embedding_B": ("F32", (8, 4), 1.0),
    }
    folder = write_adapter(tmp_path, pair(Q0) | pair(V0) | embedding)
    assert codes(folder).keys() == {"modules_to_save"}
    assert reader.read(folder, modules_to_save="strip").spec.stripped == tuple(embedding)


def test_names_inside_keys_and_missing_prefixes_are_read(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for path in (Q0, V0):
        tensors[f"{path}.lora_A.mine.weight"] = ("F32", (4, 8), 1.0)
        tensors[f"{path}.lora_B.mine.weight"] = ("F32", (6, 4), 1.0)
    found = reader.read(write_adapter(tmp_path, tensors))
    assert [m.path for m in found.spec.modules] == [Q0, V0]
    assert [reason.code for reason in found.reasons] == ["bare_keys"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"base_model.model.{key}",
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
        lambda key: key.replace(".q_proj", "._checkpoint_wrapped_module.q_proj"),
    ],
    ids=["compile", "ddp", "peft_twice", "compiled_base", "fsdp", "checkpointing"],
)
def test_what_training_put_around_modules_is_no_part_of_their_paths(
    wrap: Callable[[str], str], tmp_path: Path
) -> None:
    """Patterns are about the paths in the model alone."""
    tensors = {wrap(name): about for name, about in (pair(Q0) | pair(V0)).items()}
    folder = write_adapter(tmp_path, tensors, alpha_pattern={f"^{Q0}": 2})
    assert codes(folder).keys() == {"wrapped_keys"}
    modules = reader.read(folder).spec.modules
    assert [(m.path, m.lora_alpha) for m in modules] == [(Q0, 2), (V0, 8)]


def test_a_torn_adapter_is_pointed_out(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, pair(Q0) | pair(Q1) | pair(V0))
    assert codes(folder)["uneven_layers"].startswith("self_attn.v_proj is in 1 of 2 layers")


def test_single_idle_modules_are_named_and_dtypes_that_differ(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, pair(Q0, value=0.0) | pair(V0, dtype="F16"))
    assert Q0 in codes(folder)["zero_modules"]
    assert "F16 and F32" in codes(folder)["dtype_mix"]
    assert reader.read(folder).spec.dtype == "F32"


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_one_bad_number_in_a_large_tensor_is_found(dtype: str, tmp_path: Path) -> None:
    tensors = pair(Q0, r=4, size=(40_000, 6), dtype=dtype) | pair(V0, dtype=dtype)
    data = bytearray(safetensors(tensors))
    itemsize = 4 if dtype == "F32" else 2
    infinity = {"F32": b"\x00\x00\x80\xff", "F16": b"\x00\xfc", "BF16": b"\x80\xff"}[dtype]
    header = int.from_bytes(data[:8], "little")
    for at in (8 + header, 8 + header + 131_000 * itemsize, len(data) - itemsize):
        sound = bytes(data[at : at + itemsize])
        data[at : at + itemsize] = infinity
        assert "not_finite" in codes(write_adapter(tmp_path, bytes(data)))
        data[at : at + itemsize] = sound
    assert codes(write_adapter(tmp_path, bytes(data))) == {}


def test_numbers_out_of_proportion_are_pointed_out(tmp_path: Path) -> None:
    assert "large_numbers" in codes(write_adapter(tmp_path, pair(Q0, value=-5_000.0) | pair(V0)))


def test_an_mlx_adapter_is_read_transposed(tmp_path: Path) -> None:
    found = reader.read(write_mlx(tmp_path / "new", {"rank": 4, "scale": 20.0}))
    assert found.spec.modules == (module(Q0, lora_alpha=80.0, scaling=20.0),)
    assert found.tensors[Q0] == AdapterTensors(f"{Q0}.lora_a", f"{Q0}.lora_b", transposed=True)
    assert [reason.code for reason in found.reasons] == ["mlx_converted"]


@pytest.mark.parametrize(
    ("parameters", "config", "code"),
    [
        ({"rank": 4}, {}, "mlx_scale"),
        ({"rank": 4, "scale": 20.0}, {"fine_tune_type": "dora"}, "mlx_fine_tune_type"),
        ({"rank": "4", "scale": 20.0}, {}, "rank"),
        ({"rank": 8, "scale": 20.0}, {}, "rank_mismatch"),
        ({"rank": 4, "scale": 1e-31}, {}, "mlx_scale"),
    ],
)
def test_an_mlx_adapter_that_cannot_be_converted_is_refused(
    parameters: dict[str, Any], config: dict[str, Any], code: str, tmp_path: Path
) -> None:
    assert code in codes(write_mlx(tmp_path / "mlx", parameters, **config))


@pytest.mark.parametrize(
    ("scale", "asked"),
    [("20.0", "'20.0'; MLX-LM needs a number from 1e-20 to 10^6 there without quotes"), (-1, "-1")],
)
def test_a_scale_of_mlx_that_is_none_is_quoted(scale: object, asked: str, tmp_path: Path) -> None:
    folder = write_mlx(tmp_path / "mlx", {"rank": 4, "scale": scale})
    assert f"lora_parameters.scale is {asked}" in codes(folder)["mlx_scale"]


SHAPES = dict.fromkeys((Q0, Q1, V0, V1), (8, 6))
ROOM = 1 << 30
"""Bytes that a stack may take."""


def test_an_adapter_that_fits_its_base_stays_as_it_is(tmp_path: Path) -> None:
    found = reader.read(write_adapter(tmp_path))
    assert fit_to_base(found, SHAPES | {"lm_head": (8, 99)}) == found


def test_the_first_shape_that_differs_from_the_base_is_named(tmp_path: Path) -> None:
    found = reader.read(write_adapter(tmp_path))
    with pytest.raises(IncompatibleAdaptersError, match=f"{V0} has 8 inputs and 6 outputs"):
        fit_to_base(found, SHAPES | {V0: (8, 12)})


def test_layers_under_another_name_are_found_where_only_one_place_fits(tmp_path: Path) -> None:
    found = reader.read(write_adapter(tmp_path))
    inside = {path.replace("model.", "model.language_model.", 1): s for path, s in SHAPES.items()}
    vision = {"model.visual.blocks.0.attn.qkv": (4, 12)}
    moved = fit_to_base(found, inside | vision)
    assert {m.path for m in moved.spec.modules} == set(inside)
    assert moved.tensors.keys() == inside.keys()
    assert "model.language_model.layers" in moved.reasons[-1].message
    twice = {path.replace("model.", "model.other_model.", 1): s for path, s in SHAPES.items()}
    with pytest.raises(IncompatibleAdaptersError, match="several stacks"):
        fit_to_base(found, inside | twice)
    with pytest.raises(IncompatibleAdaptersError, match=r"its layers lie under model\.visual"):
        fit_to_base(found, vision)


def test_layers_of_single_experts_are_refused_by_what_the_base_has_instead(tmp_path: Path) -> None:
    experts = pair("model.layers.0.mlp.experts.3.up_proj")
    found = reader.read(write_adapter(tmp_path, pair(Q0) | experts, target_modules="all-linear"))
    with pytest.raises(IncompatibleAdaptersError, match="has all experts of a layer in one tensor"):
        fit_to_base(found, SHAPES)
    with pytest.raises(IncompatibleAdaptersError, match="Check which base"):  # it has fewer of them
        fit_to_base(found, SHAPES | {"model.layers.0.mlp.experts.0.up_proj": (8, 6)})


@pytest.mark.parametrize("name", ["feed_forward.router", "mlp.gate", "block_sparse_moe.gate"])
def test_a_router_that_returns_its_choices_is_refused_as_one(name: str, tmp_path: Path) -> None:
    router = pair(f"model.layers.0.{name}")
    found = reader.read(write_adapter(tmp_path, pair(Q0) | router, target_modules="all-linear"))
    with pytest.raises(IncompatibleAdaptersError, match="router of a mixture returns its ch"):
        fit_to_base(found, SHAPES)


def test_the_ranks_of_all_fused_experts_together_are_not_held_against_r(tmp_path: Path) -> None:
    """PEFT writes r rows for each expert; `down_proj` under the name of the module around it."""
    both = pair("model.layers.0.mlp.experts.base_layer", r=16) | pair(
        "model.layers.0.mlp.experts", 16
    )
    folder = write_adapter(tmp_path, both, target_parameters=["mlp.experts.down_proj"])
    found = codes(folder)
    assert "target_parameters" in found
    assert "rank_mismatch" not in found


def test_layers_of_the_base_that_an_adapter_leaves_alone_are_counted(tmp_path: Path) -> None:
    found = reader.read(write_adapter(tmp_path, pair(Q0) | pair(V0)))
    (reason,) = fit_to_base(found, SHAPES).reasons
    assert (reason.code, "no LoRA for 2" in reason.message) == ("partial", True)


def test_experts_that_fit_together_are_stacked_without_a_word(tmp_path: Path) -> None:
    one = reader.read(write_adapter(tmp_path / "one"))
    two = reader.read(write_adapter(tmp_path / "two", pair(Q0, r=2), r=2))
    assert check_stackable({"one": one, "two": two}, ROOM) == ()
    assert stack_bytes([one.spec, two.spec]) == 4 * (4 * 4 * 14 + 2 * 14)


def test_one_adapter_under_two_names_is_refused(tmp_path: Path) -> None:
    one, two = (reader.read(write_adapter(tmp_path / name)) for name in ("one", "two"))
    with pytest.raises(IncompatibleAdaptersError, match="one and two are the same adapter"):
        check_stackable({"one": one, "two": two}, ROOM)
    scaled = reader.read(write_adapter(tmp_path / "scaled", lora_alpha=16))
    (reason,) = check_stackable({"one": one, "scaled": scaled}, ROOM)
    assert reason.code == "same_weights"


def test_dtypes_and_memory_of_a_stack_are_looked_at(tmp_path: Path) -> None:
    one = reader.read(write_adapter(tmp_path / "one"))
    half = reader.read(write_adapter(tmp_path / "half", pair(Q0, dtype="BF16")))
    (reason,) = check_stackable({"one": one, "half": half}, ROOM)
    assert (reason.code, "BF16 (half), F32 (one)" in reason.message) == ("dtype_mix", True)
    with pytest.raises(IncompatibleAdaptersError, match="leave some out"):
        check_stackable({"one": one}, 100)
