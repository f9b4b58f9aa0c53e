"""One token takes a shorter way through a layer, and comes out the same."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.kernels import dispatch
from meteora.kernels import stack as stacks
from meteora.kernels.dispatch import IN_TORCH
from meteora.model.fused import force_expert
from meteora.routing.gates import watch_prompts
from meteora.routing.hooks import recorded_routes
from meteora.routing.layer import MoELoRALinear, routed_layers
from meteora.routing.prompt_router import HeldChoice, PromptRouter
from meteora.routing.routers import Decision, Follower, Gate
from tests.meteora.routing.test_layer import RANKS, definition, make

PROMPT = torch.tensor([[5, 8, 13, 21, 34, 55]])


@pytest.fixture
def short(monkeypatch):
    """The layers that took the short way, one entry for each token."""
    taken = []

    def counted(layer, *args, found=MoELoRALinear._one_token):
        taken.append(layer)
        return found(layer, *args)

    monkeypatch.setattr(MoELoRALinear, "_one_token", counted)
    return taken


def long_way(layer, x):
    return layer._routed(x, layer.router)


def choosing(layer, choice):
    """The same layer, whose gate gives every token this choice."""
    with torch.no_grad():
        layer.router.bias[:] = 0
        layer.router.bias[choice] = 1e3
    return layer


def one_choice(**options):
    return make(top_k=1, **options)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (1, 1, 12)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("choice", range(len(RANKS) + 1))
@pytest.mark.parametrize("has_offsets", [False, True])
def test_each_choice_adds_what_it_adds_by_the_long_way(short, shape, mode, choice, has_offsets):
    """An expert without ranks, too, and the mean of experts that are scaled differently."""
    layer, x = choosing(one_choice(mean=True), choice), torch.randn(shape)
    if has_offsets:
        layer.router.offsets = torch.randn(len(RANKS) + 1, 10)
    given = x.clone()
    with mode():
        for _ in range(2):  # the second time with the views of the first
            torch.testing.assert_close(layer(x), long_way(layer, x), rtol=1e-6, atol=1e-6)
        if not has_offsets:
            torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)
    assert short.count(layer) == (2 if has_offsets else 3)
    assert torch.equal(x, given)


def test_a_single_expert_gives_the_same_bits(short):
    layer, x = choosing(one_choice(), 3), torch.randn(1, 1, 12)
    with torch.inference_mode():
        assert torch.equal(layer(x), long_way(layer, x))
    assert short == [layer]


@pytest.mark.parametrize("margin", [None, 0.5])
@pytest.mark.parametrize("has_offsets", [False, True])
def test_a_token_may_have_two_experts(short, monkeypatch, margin, has_offsets):
    monkeypatch.setattr(dispatch, "choose_kernel", lambda *_args, **_sizes: "grouped")
    layer, counts = make(mean=True), set()
    layer.router.options = RouterOptions("gate", 2, 0.7, margin)
    if has_offsets:
        layer.router.offsets = torch.randn(len(RANKS) + 1, 10)
    for x in torch.randn(12, 1, 1, 12):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), long_way(layer, x), rtol=1e-5, atol=1e-5)
            counts.add(sum(weight > 0 for _, weight in layer.router.choose_for_one(x[0])))
    assert short == [layer] * 12
    assert counts == ({2} if margin is None else {1, 2})


@pytest.mark.parametrize("kernel", [*IN_TORCH])
def test_a_kernel_that_is_asked_for_computes_the_token(short, kernel):
    layer = one_choice(kernel=kernel)
    with torch.inference_mode():
        layer(torch.randn(1, 12))
    assert not short


@pytest.mark.parametrize(
    ("options", "x", "mode"),
    [
        ({"ranks": [1] * 40, "top_k": 40}, torch.randn(1, 12), torch.no_grad),
        ({"top_k": 1}, torch.randn(2, 12), torch.no_grad),
        ({"top_k": 1}, torch.randn(0, 12), torch.no_grad),
        ({"top_k": 1}, torch.randn(1, 12), torch.enable_grad),
        ({"top_k": 1}, torch.randn(1, 12, dtype=torch.float64), torch.no_grad),
    ],
    ids=["many experts", "two tokens", "no token", "with gradients", "in 64 bits"],
)
def test_all_else_goes_the_long_way(short, options, x, mode):
    layer = make(**options).to(x.dtype)
    with mode():
        torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)
    assert not short


def test_autocast_and_16_bits_go_the_long_way(short):
    layer, x = one_choice(), torch.randn(1, 12)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer.bfloat16()(x.bfloat16())
    assert not short


def test_a_projection_that_changes_the_dtype_goes_the_long_way():
    class Narrow(nn.Linear):
        def forward(self, input):  # noqa: A002  (as torch names it)
            return super().forward(input).bfloat16()

    layer, x = one_choice(), torch.randn(1, 12)
    narrow = Narrow(12, 10)
    narrow.load_state_dict(layer.projection.state_dict())
    layer.projection = narrow
    with torch.no_grad():
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), definition(layer, x).float(), rtol=0.02, atol=0.05)


def test_experts_in_16_bits_go_the_long_way():
    layer, x = one_choice(), torch.randn(1, 12)
    layer.stack.bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), definition(layer, x), rtol=0.02, atol=0.05)


def moved(layer):
    return layer.to(torch.float64).to(torch.float32)


def replaced(layer):
    layer.stack.a, layer.stack.b = layer.stack.a * 2, layer.stack.b * 3
    return layer


def in_place(layer):
    layer.stack.b.mul_(3)
    return layer


@pytest.mark.parametrize("change", [moved, replaced, in_place, copy.deepcopy])
def test_no_view_is_stale_after_experts_change(short, change):
    layer, x = choosing(one_choice(), 0), torch.randn(1, 12)
    with torch.inference_mode():
        before = layer(x)
    layer = change(layer)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x), before) == (change in {moved, copy.deepcopy})
    assert len(short) == 3


def test_a_layer_keeps_few_views(monkeypatch, short):
    monkeypatch.setattr(stacks, "MOST_UPDATES", 2)
    layer, x = one_choice(ranks=[1, 2, 3, 4]), torch.randn(1, 12)
    for choice in [0, 1, 2, 3, 0]:
        choosing(layer, choice)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), definition(layer, x), rtol=1e-5, atol=1e-5)
        assert len(layer.stack._updates.by_choice) <= 2
    assert len(short) == 5


def test_no_view_is_pickled():
    layer, x = choosing(one_choice(), 0), torch.randn(1, 12)
    size = len(pickle.dumps(layer))
    with torch.no_grad():
        y = layer(x)
        assert len(pickle.dumps(layer)) == size
        same = pickle.loads(pickle.dumps(layer))  # noqa: S301  (made above)
        assert torch.equal(same(x), y)


def leader_and_follower():
    leader, follower = one_choice(seed=0), one_choice(seed=1)
    leader.router.decision = Decision()
    follower.router = Follower(leader.router.decision, follower.num_choices, leader.router.options)
    return leader, follower


@pytest.mark.parametrize("long_at", [None, 0, 1])
def test_a_follower_takes_the_choice_whichever_way_its_gate_went(short, long_at):
    layers = leader_and_follower()
    if long_at is not None:
        layers[long_at].kernel = "grouped"
    choices = set()
    for _ in range(8):
        x = torch.randn(1, 12)
        with torch.no_grad():
            _, y = (layer(x) for layer in layers)
            choice = int(layers[0].router.logits(x).argmax())
            expected = layers[1].projection(x)
            a, b = layers[1].stack.pair(choice)
            expected = expected + (x @ a.T * layers[1].stack.scale(choice)) @ b.T
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        choices.add(choice)
    assert len(choices) > 1
    assert len(short) == (16 if long_at is None else 8)


def test_a_follower_uses_no_choice_of_an_earlier_pass(short):
    """Of several tokens a gate writes no single choice, and a caller may write logits itself."""
    leader, follower = leader_and_follower()
    decision, x = leader.router.decision, torch.randn(1, 12)
    with torch.no_grad():
        leader(x)
        assert decision.one
        ((earlier, _),) = decision.one[1]
        decision.logits = nn.functional.one_hot(torch.tensor([earlier - 1]) % 4, 4).float()
        decision.routes = None
        follower(x)
        assert follower.router.choose_for_one(x) == (((earlier - 1) % 4, 1.0),)
        leader(torch.randn(3, 12))
        assert follower(torch.randn(3, 12)).shape == (3, 10)
    assert short == [leader, follower]


def gated(model, options, *, by=None):
    """The same model with a random gate at each layer; those of k and v follow that of q."""
    torch.manual_seed(3)
    reader = watch_prompts(model, by, options) if by else None
    decision = Decision()
    for path, layer in routed_layers(model).items():
        if path.endswith("q_proj"):
            decision = Decision()
        if path.endswith(("k_proj", "v_proj")):
            layer.router = Follower(decision, layer.num_choices, options)
            continue
        weight = torch.randn(layer.num_choices, layer.stack.a.shape[1])
        layer.router = Gate(
            weight,
            torch.randn(len(weight)),
            options,
            by_question=reader.at_gate() if reader else None,
            decision=decision if path.endswith("q_proj") else None,
        ).requires_grad_(requires_grad=False)
    return model


ANSWER = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("rule", ["token", "turn", "opening", "forced"])
def test_a_model_writes_the_same_answer(world, short, monkeypatch, rule):
    """By gates for each token, for each turn or with an opening; and by one expert."""
    model = world.load()
    options = RouterOptions("gate", 1, 1.0, share="turn" if rule == "turn" else "point")
    by = Template((5, 8), (34, 55)) if rule in {"turn", "opening"} else None
    gated(model, options, by=by)
    forced = force_expert(model, min(world.adapters)) if rule == "forced" else nullcontext()
    with forced:
        by_short = model.generate(PROMPT, **ANSWER)
        assert set(short) == set(routed_layers(model).values())
        num_taken = len(short)
        monkeypatch.setattr(MoELoRALinear, "_has_short_way", lambda *_: False)
        assert torch.equal(model.generate(PROMPT, **ANSWER), by_short)
    assert len(short) == num_taken


def test_routes_of_one_token_are_recorded(world, short, monkeypatch):
    model, found = gated(world.load(), RouterOptions("gate", 1, 1.0, share="point")), []
    for _ in range(2):
        cache = DynamicCache()
        with torch.no_grad():
            model(PROMPT, past_key_values=cache)
            with recorded_routes(model) as routes:
                model(PROMPT[:, :1], past_key_values=cache)
        found.append({path: experts.tolist() for path, (_, experts) in routes.items()})
        monkeypatch.setattr(MoELoRALinear, "_has_short_way", lambda *_: False)
    assert found[0] == found[1]
    assert found[0].keys() == routed_layers(model).keys()
    assert len(short) == len(found[0])


def test_a_router_reads_a_prompt_of_one_token():
    layer, held, read = one_choice(), HeldChoice(), []
    held.measure = lambda _router, x: read.append(x)
    ranks = sum(RANKS)
    layer.router = PromptRouter(
        torch.randn(ranks, 12),
        torch.zeros(ranks),
        layer.stack,
        RouterOptions("gate", 1, 1.0),
        held,
    )
    x = torch.randn(1, 1, 12)
    with torch.no_grad():
        assert torch.equal(layer(x), layer.projection(x))
    assert read == [x]
