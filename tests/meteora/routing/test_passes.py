"""What a pass is called with is read however it is called, and by the watcher of that model."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.checkpoint.tensors import Gates
from meteora.model.fused import without_experts
from meteora.routing.gates import insert_gates
from meteora.routing.passes import PassInput, UnreadPromptError

OPENING, CLOSING = (1, 50, 51, 52), (53, 54)
TEMPLATE = Template(OPENING, CLOSING, OPENING[1:])
FIRST = [*OPENING, 7, 8, 9, *CLOSING]
OTHER = [*OPENING, 30, 41, 22, 35, 37, *CLOSING]


@pytest.fixture(params=["turn", "opening"])
def model(request, world):
    """Gates that look at whole prompts, and weigh single tokens enough for every change to show."""
    model = world.load()
    generator = torch.Generator().manual_seed(1)
    gates = {
        path: (3 * torch.randn(4, entry.in_features, generator=generator), torch.zeros(4))
        for path, entry in world.manifest.modules.items()
    }
    options = RouterOptions("gate", 1, 1.0)
    if request.param == "turn":
        options = RouterOptions("gate", 1, 1.0, share="turn")
    insert_gates(model, Gates(gates, template=TEMPLATE), options)
    return model


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_a_copy_of_a_model_sees_its_own_passes(model, copied):
    expected = model(torch.tensor([OTHER])).logits
    model(torch.tensor([FIRST]))
    assert torch.equal(copied(model)(torch.tensor([OTHER])).logits, expected)


@torch.no_grad()
def test_a_pass_that_does_not_begin_with_a_call_of_the_whole_model_is_seen(model):
    """Such as one for hidden states; the prompt before had as many tokens, at other places."""
    ids = torch.tensor([[*OPENING, 7, *CLOSING, *OPENING[1:], 9]])
    expected = model(ids).logits
    model(torch.tensor([OTHER]))
    assert torch.equal(model.lm_head(model.model(ids).last_hidden_state), expected)
    model(torch.tensor([OTHER]))
    assert torch.equal(model.forward(ids).logits, expected)


@torch.no_grad()
def test_the_last_logits_are_asked_for_on_no_device(model):
    """Of a model on several GPUs the tokens are on the first, the last hidden states on another."""
    ids, asked = torch.tensor([OTHER]), []
    expected = model(ids).logits[:, -2:]
    model.register_forward_pre_hook(
        lambda _model, _args, kwargs: asked.append(kwargs["logits_to_keep"]), with_kwargs=True
    )
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, expected)
    assert asked == [slice(-2, None)]


@torch.no_grad()
def test_a_pass_that_failed_before_its_base_model_is_over(model):
    first, ids = torch.tensor([FIRST]), torch.tensor([OTHER[: len(FIRST)]])
    expected = model(ids).logits

    def fail(*_):
        raise RuntimeError("no memory")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model(first)
    hook.remove()
    assert torch.equal(model.lm_head(model.model(ids).last_hidden_state), expected)


@torch.no_grad()
def test_rows_of_several_sequences_are_refused_where_a_gate_decides_by_them(model):
    """transformers' continuous batching lays all prompts end to end, and trainers do."""
    ids = torch.tensor([[*FIRST, *OTHER]])
    ends = torch.tensor([0, len(FIRST), ids.shape[1]], dtype=torch.int32)
    with without_experts(model):
        model(ids, cu_seq_lens_q=ends)
    places = torch.tensor([[*range(len(FIRST)), *range(len(OTHER))]])
    own = torch.block_diag(*(torch.ones(len(p), len(p)).tril() for p in (FIRST, OTHER)))
    block = {"attention_mask": own.bool()[None, None]}
    for packed in ({"cu_seq_lens_q": ends}, {"position_ids": places}, block):
        with pytest.raises(UnreadPromptError, match="several sequences lie in one row"):
            model(ids, **packed)
    expected = model(ids).logits
    assert torch.equal(model(ids, position_ids=torch.arange(ids.shape[1])[None]).logits, expected)


def packed(num_rows=1, **given):
    before = {"input_ids": torch.ones(num_rows, 6).long(), "past_key_values": DynamicCache()}
    return PassInput.of(before | given).packed


def test_rows_of_several_sequences_are_found_by_positions_and_masks_of_every_form():
    risen, again = torch.arange(6), torch.tensor([0, 1, 2, 3, 0, 1])
    # an image of 2 × 2 patches: frames, rows, columns
    image = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    for num_rows, one, several in (
        (2, risen, again),
        (1, risen[None], again[None]),
        (2, image[:, None].expand(3, 2, 6), again.expand(3, 2, 6)),
    ):
        assert not packed(num_rows, position_ids=one)
        assert packed(num_rows, position_ids=several)
    causal = torch.ones(6, 6).tril().bool()[None, None]
    block = causal & ((risen < 4) == (risen < 4)[:, None])
    least = torch.finfo(torch.float32).min
    for form in (
        lambda mask: mask,
        lambda mask: torch.zeros(mask.shape).masked_fill(~mask, least),
        lambda mask: {"full_attention": mask},
        lambda mask: torch.nn.functional.pad(mask, (0, 9)),  # of a static cache
    ):
        assert not packed(2, attention_mask=form(causal))
        assert packed(2, attention_mask=form(block))
    padding = causal & (risen >= 3)
    assert not packed(attention_mask=padding, position_ids=(risen - 3).clamp_min(0)[None])


@torch.no_grad()
def test_a_mask_may_be_as_long_as_a_static_cache(model):
    ids = torch.tensor([OTHER])
    expected = model(ids).logits
    mask = (torch.arange(40) < len(OTHER)).long()[None]
    cache = StaticCache(config=model.config, max_cache_len=40)
    found = model(ids, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found, expected)


def padded(*prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


@torch.no_grad()
def test_a_mask_may_be_positional(model):
    ids, mask = padded(FIRST, OTHER)
    assert torch.equal(model(ids, mask).logits, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_padded_batch_is_answered_as_its_prompts_are_on_every_cache(model, kind):
    ids, mask = padded(FIRST, OTHER)
    asked = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, cache_implementation=kind, **asked)
    for row, prompt in zip(together[:, ids.shape[1] :], (FIRST, OTHER), strict=True):
        alone = model.generate(torch.tensor([prompt]), **asked)[0, len(prompt) :]
        assert torch.equal(row, alone)


@torch.no_grad()
def test_a_prompt_of_one_token_begins_where_the_cache_is_one_of_states(build_base):
    base = AutoModelForCausalLM.from_pretrained(build_base("mamba"))
    cache, one = DynamicCache(config=base.config), torch.tensor([[7]])
    assert not PassInput.of({"input_ids": one, "cache_params": cache}).goes_on
    base(one, cache_params=cache)
    assert PassInput.of({"input_ids": one, "cache_params": cache}).goes_on
    assert PassInput.of({"input_ids": one, "cache_params": object()}).goes_on


class Behind:
    """A cache that holds two tokens."""

    def get_seq_length(self):
        return 2


@pytest.mark.parametrize(
    ("num_keys", "shift"), [(5, 2), (8, 2), (4, 1)], ids=["dynamic", "static", "window"]
)
@pytest.mark.parametrize("form", ["bool", "added", "dict", "one for all"])
def test_of_a_mask_of_queries_and_keys_a_token_is_there_that_sees_itself(num_keys, shift, form):
    sees = torch.zeros(2, 1, 3, num_keys, dtype=torch.bool)
    sees[0, 0] = torch.ones(3, num_keys).tril(shift).bool()
    sees[1, 0] = sees[0, 0].clone()
    sees[1, 0, :, shift] = False  # the first of the pass is padding
    mask = {
        "bool": sees,
        "added": torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min),
        "dict": {"sliding_attention": sees[:1], "full_attention": sees},
        "one for all": sees[1:],
    }[form]
    given = {"input_ids": torch.ones(2, 3).long(), "past_key_values": Behind()}
    seen = PassInput.of(given | {"attention_mask": mask})
    assert seen.is_token.tolist() == [[form != "one for all", True, True], [False, True, True]]
    assert seen.goes_on
