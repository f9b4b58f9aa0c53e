"""A server that puts the outputs of a projection in another order is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora.serving.base_order import refuse_another_order
from meteora.serving.vllm_version import UnservableError

BY_HEADS = "transformer.h.0.self_attention.query_key_value"


def weight_of(base, path):
    return load_file(base / "model.safetensors")[f"{path}.weight"]


def test_the_order_of_the_file_is_accepted_in_16_bits_too(build_base):
    base, path = build_base("llama"), "model.layers.1.mlp.up_proj"
    weight = weight_of(base, path)
    refuse_another_order(base, path, weight)
    refuse_another_order(base, path, weight.to(torch.bfloat16))


def test_many_outputs_are_compared_where_numbers_are_in_16_bits_by_default(tmp_path):
    weight = torch.randn(1536, 8, dtype=torch.float32)  # in bfloat16, 1535 is 1536
    save_file({f"{BY_HEADS}.weight": weight}, tmp_path / "model.safetensors")
    torch.set_default_dtype(torch.bfloat16)
    try:
        refuse_another_order(tmp_path, BY_HEADS, weight.bfloat16())
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_weight_that_the_file_has_turned_is_accepted(build_base):
    base, path = build_base("gpt2"), "transformer.h.0.attn.c_attn"
    refuse_another_order(base, path, weight_of(base, path).T)


@pytest.mark.parametrize("left_out", ["", "transformer."])
def test_heads_that_are_put_in_another_order_are_refused(build_base, tmp_path, left_out):
    weights = load_file(build_base("bloom") / "model.safetensors")
    save_file(
        {name.removeprefix(left_out): weight for name, weight in weights.items()},
        tmp_path / "model.safetensors",
    )
    weight = weights[f"{BY_HEADS}.weight"]
    refuse_another_order(tmp_path, BY_HEADS, weight)
    repacked = weight.view(4, 3, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
    with pytest.raises(UnservableError, match=r"query_key_value: vLLM keeps its weights in anoth"):
        refuse_another_order(tmp_path, BY_HEADS, repacked)


def test_a_module_that_the_file_names_otherwise_is_not_compared(build_base):
    refuse_another_order(build_base("llama"), "model.layers.1.mlp.up_gate", torch.zeros(8, 8))
