"""One expert for a prompt: found without examples, held for the answer, chosen anew each turn."""

import copy
import dataclasses
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

import meteora
from meteora.artifacts import NULL, RouterOptions
from meteora.base.chat_template import Template
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST, CheckpointError, read_manifest
from meteora.fitting.background import RIDGE, RidgeWhitening, fit_to_background, standard_of
from meteora.fitting.sequences import TrainingError
from meteora.kernels.stack import ExpertStack
from meteora.model.chat import Chat
from meteora.model.fused import expert_names, force_expert, insert_experts, without_experts
from meteora.model.prompt_choice import mean_of_others
from meteora.model.trace import trace
from meteora.routing import passes
from meteora.routing.hooks import recorded_routes
from meteora.routing.layer import routed_layers
from meteora.routing.passes import WATCHER, UnreadPromptError
from meteora.routing.prompt_router import HeldChoice, PromptRouter
from tests.meteora.fitting.test_calibrate import task_tokens
from tests.meteora.fitting.test_joint import switch
from tests.meteora.model.test_threads import interrupted, read
from tests.meteora.routing.test_turns import rebuilt
from tests.pipelines.conftest import CHAT_TEMPLATE

OPENING, CLOSING = (1, 50, 51, 52), (53, 54)
TEMPLATE = Template(OPENING, CLOSING, OPENING[1:])
OPTIONS = RouterOptions("prompt", top_k=1, temperature=1.0, null=True)
NEW = 6


def asked(e, seed=0, length=24):
    """A question about task e, in the template."""
    return [*OPENING, *task_tokens(e, length, random.Random(seed)), *CLOSING]


def background(num=24):
    """Questions that speak with tokens that no task has, and with all tasks' tokens mixed."""
    dice = random.Random(1)
    texts = [[*OPENING, *[dice.randrange(20, 48) for _ in range(12)], *CLOSING] for _ in range(num)]
    return texts + [[dice.randrange(3, 48) for _ in range(12)] for _ in range(num)]


@torch.no_grad()
def learn(model):
    """Turn each expert's A towards the inputs of its own task, as training does."""
    layers = routed_layers(model)
    inputs, hooks = {}, []
    for path, layer in layers.items():

        def keep(_layer, args, path=path):
            inputs[path] = args[0].flatten(0, 1)

        hooks.append(layer.register_forward_pre_hook(keep))
    for e in range(4):
        own = torch.tensor([asked(e, seed, 30)[len(OPENING) : -2] for seed in range(50, 54)])
        model(own)
        for path, layer in layers.items():
            starts = [0, *torch.tensor(layer.stack.ranks).cumsum(0).tolist()]
            direction = torch.nn.functional.normalize(inputs[path].mean(0), dim=0)
            layer.stack.a[starts[e] : starts[e + 1]] += 6 * direction
    for hook in hooks:
        hook.remove()


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    """A checkpoint with such a router, whose experts know their tasks."""
    folder = tmp_path_factory.mktemp("prompt")
    manifest = dataclasses.replace(world.manifest, router=OPTIONS, files={})
    model = world.load_base()
    insert_experts(model, world.checkpoint, manifest)
    learn(model)
    parts = load_file(world.checkpoint / EXPERTS)
    for path, layer in routed_layers(model).items():
        parts[f"{path}.lora_A"] = layer.stack.a.contiguous()
    save_file(parts, folder / EXPERTS)
    gates = fit_to_background(model, background(), OPTIONS, TEMPLATE)
    tensors.write_prompt_gates(folder / GATES, gates)
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


@pytest.fixture(scope="module")
def model(checkpoint, world):
    return meteora.load(checkpoint, base_folder=world.base)[0]


@torch.no_grad()
def chosen(model, prompt):
    """The names of what the prompts of a pass are given to."""
    model(torch.tensor([prompt]))
    logits = getattr(model, WATCHER).held.logits
    return expert_names(model)[int(logits.argmax(-1))]


def answer(model, prompt, **options):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(ids, **options)[0, len(prompt) :].tolist()


def routes_of(model, ids, cache):
    """The experts that the tokens of a pass get."""
    with recorded_routes(model) as routes:
        model(ids, past_key_values=cache)
    return {e for _, chosen in routes.values() for e in chosen.flatten().tolist()}


@pytest.mark.parametrize("e", range(4))
def test_a_prompt_goes_to_the_expert_that_learnt_from_its_like(model, e):
    names = expert_names(model)
    assert [chosen(model, asked(e, seed)) for seed in range(6)] == [names[e]] * 6


def test_a_prompt_on_which_nobody_stands_out_goes_to_the_base(model):
    unknown = [*OPENING, *[20 + 3 * i for i in range(9)], *CLOSING]
    assert chosen(model, unknown) == NULL
    with without_experts(model):
        base = answer(model, unknown)
    assert answer(model, unknown) == base


def test_each_thread_reads_its_own_prompt(model):
    one, other = asked(0), asked(1)
    expected, others = read(model, one), read(model, other)
    got, found = interrupted(model, lambda: read(model, one), lambda: read(model, other))
    assert torch.equal(got, expected)
    assert all(torch.equal(logits, others) for logits in found)


def test_gradient_checkpointing_computes_again_in_any_thread(model):
    """On a GPU the backward pass has a thread of its own."""
    own = copy.deepcopy(model)
    switch(own, use_reentrant=False)
    weight = own.get_input_embeddings().weight.requires_grad_()

    def gradient(run):
        weight.grad = None
        run(own(torch.tensor([asked(0)]), use_cache=False).logits.square().sum().backward)
        return weight.grad

    with ThreadPoolExecutor(1) as other:
        found = gradient(lambda backward: other.submit(backward).result())
    torch.testing.assert_close(found, gradient(lambda backward: backward()))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_the_whole_answer_is_that_of_the_chosen_expert(model, options):
    for e, name in enumerate(expert_names(model)[:4]):
        with force_expert(model, name):
            expected = answer(model, asked(e), **options)
        assert answer(model, asked(e), **options) == expected


def test_prompts_of_one_batch_have_experts_of_their_own(model):
    prompts = [asked(e, length=5 + 2 * e) for e in range(4)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **options)[:, width:]
    for e, name in enumerate(expert_names(model)[:4]):
        with force_expert(model, name):
            assert found[e].tolist() == answer(model, prompts[e])


@torch.no_grad()
def test_no_pass_looks_for_the_routed_layers(model, monkeypatch):
    cache = DynamicCache()
    model(torch.tensor([asked(0)]), past_key_values=cache)
    monkeypatch.setattr(passes, "routed_layers", None)
    model(torch.tensor([[9]]), past_key_values=cache)


@torch.no_grad()
def test_a_later_turn_is_chosen_anew_and_the_cache_keeps_the_first(model):
    names = expert_names(model)
    first = torch.tensor([asked(1)])
    second = torch.tensor([asked(2)[1:]])  # a later turn has no first token of all
    routed, by_hand = DynamicCache(), DynamicCache()
    model(first, past_key_values=routed)
    with force_expert(model, names[1]):
        model(first, past_key_values=by_hand)
    found = model(second, past_key_values=routed).logits
    with force_expert(model, names[2]):
        expected = model(second, past_key_values=by_hand).logits
    torch.testing.assert_close(found, expected)
    assert routed.get_seq_length() == first.shape[1] + second.shape[1]


@torch.no_grad()
def test_a_conversation_in_one_pass_is_decided_by_its_last_question(model):
    ids = torch.tensor([[*asked(1), *asked(2, length=9)[1:]]])
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -9 - len(CLOSING) : -len(CLOSING)] = True
    model(ids)
    reader = getattr(model, WATCHER)
    expected = reader.read(model, last, {"input_ids": ids})
    torch.testing.assert_close(reader.held.logits, expected)


@torch.no_grad()
def test_a_new_prompt_without_a_template_is_not_the_one_before_it(model):
    assert chosen(model, asked(1)) == expert_names(model)[1]
    assert chosen(model, task_tokens(2, 24, random.Random(0))) == expert_names(model)[2]


@torch.no_grad()
def test_tokens_that_go_on_with_an_answer_change_nothing(model):
    """A draft of an assistant model, for example: several tokens, and no question among them."""
    cache = DynamicCache()
    model(torch.tensor([asked(0)]), past_key_values=cache)
    before = getattr(model, WATCHER).held.logits
    draft = task_tokens(3, 6, random.Random(4))
    model(torch.tensor([draft]), past_key_values=cache)
    model(torch.tensor([[*draft, *CLOSING]]), past_key_values=cache)  # copied from the prompt
    assert getattr(model, WATCHER).held.logits is before


@torch.no_grad()
def test_a_question_that_comes_in_two_passes_decides_when_it_ends(model):
    cache, question = DynamicCache(), asked(2)[1:]
    model(torch.tensor([asked(0)]), past_key_values=cache)
    reader = getattr(model, WATCHER)
    before = reader.held.logits
    model(torch.tensor([question[:-9]]), past_key_values=cache)
    assert reader.held.logits is before
    model(torch.tensor([question[-9:]]), past_key_values=cache)
    assert reader.held.logits is not before


@torch.no_grad()
def test_an_empty_last_question_leaves_the_choice_to_the_whole_prompt(model):
    whole = [*asked(2), *task_tokens(2, 12, random.Random(4)), *OPENING[1:], *CLOSING]
    assert chosen(model, whole) == expert_names(model)[2]


@torch.no_grad()
def test_a_row_that_goes_on_keeps_its_expert_where_another_asks_anew(model):
    names, cache = expert_names(model), DynamicCache()
    first = torch.tensor([asked(1), asked(0)])
    model(first, past_key_values=cache)
    again, said = asked(2)[1:], task_tokens(3, 6, random.Random(4))
    ids = torch.tensor([again, [0] * (len(again) - len(said)) + said])
    mask = torch.cat([torch.ones_like(first), (ids > 0).long()], 1)
    model(ids, attention_mask=mask, past_key_values=cache)
    logits = getattr(model, WATCHER).held.logits
    assert [names[e] for e in logits.argmax(-1).tolist()] == [names[2], names[0]]


@torch.no_grad()
def test_a_sequence_that_goes_on_is_not_routed_by_a_batch_that_was_read_since(model):
    cache, said = DynamicCache(), torch.tensor([task_tokens(3, 6, random.Random(4))])
    model(torch.tensor([asked(2)]), past_key_values=cache)
    model(torch.tensor([asked(0), asked(1)]))
    assert len(routes_of(model, said, cache)) == 1


@torch.no_grad()
def test_conversations_on_caches_of_their_own_take_turns(model):
    said, caches = torch.tensor([task_tokens(3, 1, random.Random(4))]), []
    for e in (1, 2):
        caches.append(DynamicCache())
        model(torch.tensor([asked(e)]), past_key_values=caches[-1])
    routes = [routes_of(model, said, cache) for cache in (*caches, caches[0])]
    assert routes[0] == routes[2] != routes[1]


@torch.no_grad()
@pytest.mark.parametrize("how", ["built", "read by a forced expert"])
def test_a_cache_without_a_choice_takes_no_other_prompt_s(model, how):
    caches, said = [DynamicCache(), DynamicCache()], torch.tensor([[9]])
    with force_expert(model, expert_names(model)[0]) if how != "built" else nullcontext():
        model(torch.tensor([asked(1)]), past_key_values=caches[0])
    if how == "built":
        caches[0] = rebuilt(caches[0])
    model(torch.tensor([asked(2)]), past_key_values=caches[1])
    with pytest.raises(UnreadPromptError, match="1 sequences go on, and the beginnings of 0"):
        model(said, past_key_values=caches[0])


@torch.no_grad()
def test_a_system_prompt_and_an_answer_behind_the_question_decide_nothing(model):
    names = expert_names(model)
    system = [1, *task_tokens(1, 4, random.Random(0)), *OPENING[1:]]
    said = task_tokens(0, 12, random.Random(0))
    prompt = [*system, *task_tokens(2, 24, random.Random(2)), *CLOSING]
    assert chosen(model, prompt) == names[2]
    assert chosen(model, [*prompt, *said]) == names[2]


@torch.no_grad()
def test_outputs_that_a_caller_asks_for_are_its_own(model):
    ids = torch.tensor([asked(0)])
    expected = model(ids).logits
    out = model(ids, labels=ids, output_hidden_states=True)
    assert torch.equal(out.logits, expected)
    assert out.loss.isfinite()
    assert out.hidden_states
    assert torch.equal(model(ids, return_dict=False)[0], expected)


@torch.no_grad()
def test_a_cache_that_cannot_be_copied_is_refused_in_one_sentence(model):
    class Offloaded(DynamicCache):
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle 'torch.Stream' object")

    with pytest.raises(UnreadPromptError, match="Offloaded cannot be copied for that"):
        model(torch.randint(3, 250, (1, 9)), past_key_values=Offloaded())


@torch.no_grad()
def test_an_empty_row_of_a_batch_leaves_the_others_their_expert(model):
    prompt = asked(2)
    ids, mask = torch.tensor([prompt, [0] * len(prompt)]), torch.ones(2, len(prompt)).long()
    mask[1] = 0
    model(ids, attention_mask=mask)
    logits = getattr(model, WATCHER).held.logits
    assert logits.isfinite().all()
    assert expert_names(model)[int(logits[0].argmax())] == expert_names(model)[2]


def test_a_model_of_16_bits_chooses_as_before(checkpoint, world):
    model = meteora.load(checkpoint, base_folder=world.base)[0].half()
    assert [chosen(model, asked(e)) for e in range(4)] == expert_names(model)[:4]


def test_a_forced_expert_is_not_read_for(model):
    before = getattr(model, WATCHER).held.logits
    with force_expert(model, "attention"):
        answer(model, asked(0))
    assert getattr(model, WATCHER).held.logits is before


def test_a_trace_has_one_expert_in_every_layer_from_the_first_token_on(model, tokenizer):
    found = trace(model, tokenizer, asked(1), max_new_tokens=4)
    assert len(found.ids) == len(asked(1)) + 4
    assert {found.experts[e] for e in found.chosen.unique().tolist()} == {"attention"}
    assert found.chosen.shape[1] == len(found.ids)


def test_a_conversation_is_read_anew_at_each_turn(model, tokenizer, monkeypatch):
    """The last question decides for all turns, so a cache of other decisions is of no use."""
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)
    chat, messages = Chat(model, tokenizer), [{"role": "user", "content": "what is this?"}]
    first = chat.answer(messages, max_new_tokens=NEW)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "and that?"},
    ]
    found = chat.answer(messages, max_new_tokens=NEW)
    assert found == Chat(model, tokenizer).answer(messages, max_new_tokens=NEW)
    name = chat.experts[0]  # a forced expert has all turns
    assert chat.answer(messages, expert=name, max_new_tokens=NEW).num_cached == 0
    assert chat.answer(messages, expert=name, max_new_tokens=NEW).num_cached > 0


@torch.no_grad()
@pytest.mark.parametrize("ranks", [[2, 3], [9, 0, 5]])
def test_the_size_of_an_update_is_that_of_the_dense_formula(ranks):
    """With more ranks than outputs, too, of which no more than the outputs are kept."""
    a, b = torch.randn(sum(ranks), 12), torch.randn(4, sum(ranks))
    root, mean, x = torch.randn(12, 12), torch.randn(12), torch.randn(5, 12)
    factors = list(zip(a.split(ranks), b.split(ranks, dim=1), strict=True))
    rows = torch.cat([torch.linalg.qr(own_b).R @ own_a @ root for own_a, own_b in factors])
    stack = ExpertStack(a, b, ranks, [1.0] * len(ranks))
    router = PromptRouter(rows, rows @ mean, stack, OPTIONS, HeldChoice())
    for found, (own_a, own_b) in zip(router.sizes(x).T, factors, strict=True):
        updates = (x - mean) @ (own_b @ own_a @ root).T
        expected = updates.norm(dim=1).log() if len(own_a) else torch.zeros(5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tokens_that_do_not_divide_among_the_prompts_are_refused():
    stack = ExpertStack(torch.randn(3, 8), torch.randn(4, 3), [1] * 3, [1.0] * 3)
    held = HeldChoice()
    router = PromptRouter(torch.randn(3, 8), torch.randn(3), stack, OPTIONS, held)
    held.logits = torch.randn(2, 3)
    assert router(torch.randn(4, 8)).shape == (4, 3)
    with pytest.raises(UnreadPromptError, match=r"5 tokens .* and 2 prompts were read"):
        router(torch.randn(5, 8))


def test_routing_without_a_prompt_is_refused(checkpoint, world):
    model = meteora.load(checkpoint, base_folder=world.base)[0]
    router = next(iter(routed_layers(model).values())).router
    assert router is not None
    with pytest.raises(
        UnreadPromptError, match=r"5 tokens are to be routed .* 0 prompts were read"
    ):
        router(torch.zeros(5, 64))
    model(torch.tensor([asked(0)[:5]]))
    assert router(torch.zeros(5, 64)).shape == (5, 5)
    getattr(model, WATCHER).stop()
    with pytest.raises(UnreadPromptError, match="0 prompts were read"):
        router(torch.zeros(5, 64))


@pytest.mark.parametrize("num_tokens", [200, 20], ids=["more tokens", "more inputs"])
def test_whitened_rows_are_rows_by_the_root_of_the_inverse_of_the_covariance(num_tokens):
    torch.manual_seed(0)
    x = torch.randn(num_tokens, 50) * torch.linspace(0.1, 3, 50)
    x, rows = x - x.mean(0), torch.randn(4, 50)
    cov = x.T.double() @ x.double() / (num_tokens - 1)
    covariance = cov + RIDGE * cov.diagonal().mean() * torch.eye(50)
    found = RidgeWhitening.of(x).of_rows(rows).double()
    expected = rows.double() @ covariance.inverse() @ rows.double().T
    torch.testing.assert_close(found @ found.T, expected, rtol=1e-5, atol=1e-5)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ values.rsqrt().diag() @ vectors.T
    torch.testing.assert_close(found, rows.double() @ root, rtol=1e-5, atol=1e-5)


def test_modules_of_one_input_are_whitened_at_once(world, monkeypatch):
    """Its eigenvectors take seconds where the inputs are wide."""
    model, found = world.load(), []
    solve = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: found.append(len(m)) or solve(m))
    fit_to_background(model, background(), OPTIONS, TEMPLATE)
    assert len(found) < len(routed_layers(model))
    assert len(found) == 2 * 4  # the inputs of q, k and v, of o, of gate and up, and of down


def test_an_expert_is_compared_with_texts_on_which_the_others_have_as_much():
    torch.manual_seed(0)
    shared = torch.randn(40, 1)
    sizes = shared * torch.tensor([1.0, 2.0, 0.5]) + 0.1 * torch.randn(40, 3)
    intercept, slope, deviation = standard_of(sizes, null=False)
    residual = (sizes - intercept - slope * mean_of_others(sizes)) / deviation
    torch.testing.assert_close(residual.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(residual.std(0), torch.ones(3))
    assert abs(torch.corrcoef(torch.cat([residual[:, :1], shared], 1).T)[0, 1]) < 0.1
    alone = standard_of(sizes[:, :1], null=False)
    torch.testing.assert_close(
        alone[:, 0], torch.stack([sizes[:, 0].mean(), alone[1, 0] * 0, sizes[:, 0].std()])
    )


def test_the_base_has_what_stands_out_less_than_any_background_text():
    torch.manual_seed(0)
    sizes = torch.randn(9, 2)
    intercept, slope, deviation = standard_of(sizes, null=True)
    others = torch.cat([mean_of_others(sizes), torch.zeros(9, 1)], 1)
    logits = (torch.cat([sizes, torch.zeros(9, 1)], 1) - intercept - slope * others) / deviation
    torch.testing.assert_close(logits[:, 2], logits[:, :2].max().expand(9))


def test_a_few_texts_are_too_few(world):
    model = world.load_base()
    manifest = dataclasses.replace(world.manifest, router=OPTIONS)
    insert_experts(model, world.checkpoint, manifest)
    with pytest.raises(TrainingError, match="3 background texts are too few"):
        fit_to_background(model, background()[:3], OPTIONS, TEMPLATE)


def test_a_text_with_nothing_behind_the_opening_is_evidence_as_a_whole(world):
    template = dataclasses.replace(TEMPLATE, closing=())
    texts = [*background(), template.opening]
    assert fit_to_background(world.load(), texts, OPTIONS, template).standard.isfinite().all()


def test_the_file_gives_back_what_was_written(checkpoint, tmp_path):
    manifest = dataclasses.replace(read_manifest(checkpoint), files={})
    gates = tensors.read_prompt_gates(checkpoint, manifest)
    tensors.write_prompt_gates(tmp_path / GATES, gates)
    assert (tmp_path / GATES).read_bytes() == (checkpoint / GATES).read_bytes()
    assert gates.template == TEMPLATE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: parts["standard"][2].zero_(), "deviations above zero of"),
        (lambda parts: parts.update(standard=torch.ones(2, 5)), r"its standard is \(2, 5\)"),
        (lambda parts: parts.update(further=torch.ones(2)), "it holds further"),
        (
            lambda parts: parts.update(
                {next(k for k in parts if k.endswith("rows")): torch.ones(1, 64)}
            ),
            r"gate\.rows has the shapes \[\(1, 64",
        ),
        (lambda parts: parts["standard"].fill_(float("nan")), "NaN"),
    ],
    ids=["deviation", "choices", "more", "rank", "nan"],
)
def test_a_damaged_file_is_refused(checkpoint, tmp_path, change, message):
    for name in (EXPERTS, MANIFEST):
        (tmp_path / name).hardlink_to(checkpoint / name)
    parts = load_file(checkpoint / GATES)
    change(parts)
    save_file(parts, tmp_path / GATES)
    manifest = read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        tensors.read_prompt_gates(tmp_path, manifest)
