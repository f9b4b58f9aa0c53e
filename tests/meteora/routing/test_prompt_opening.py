"""The opening of a prompt follows what the prompt says, in every batch and at every step."""

import pytest
import torch

from meteora.base.chat_template import Template
from meteora.checkpoint.tensors import Gates
from meteora.routing.gates import insert_gates
from meteora.routing.hooks import recorded_logits
from meteora.routing.passes import PassInput, UnreadPromptError
from meteora.routing.prompt_opening import WINDOW, PromptOpening

OPENING, CLOSING = (5, 6, 5), (7, 8)
ONE = [*OPENING, 10, 11, 12, *CLOSING]
OTHER = [*OPENING, 20, 21, *CLOSING, 30]
TEMPLATE = Template(OPENING, CLOSING)


def seen(rows, width, left, template=TEMPLATE):
    opening_rule, ids = PromptOpening(template), torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    opening_rule.see(PassInput(ids, mask.bool(), goes_on=False))
    assert opening_rule.now.opening is not None
    assert opening_rule.now.evidence is not None
    return [
        (
            [t for t, at in zip(row, opening, strict=True) if at],
            [t for t, at in zip(row, own, strict=True) if at],
        )
        for row, opening, own in zip(
            ids.tolist(),
            opening_rule.now.opening.tolist(),
            opening_rule.now.evidence.tolist(),
            strict=True,
        )
    ]


@pytest.mark.parametrize("left", [True, False])
def test_the_opening_is_found_and_the_evidence_ends_where_the_answer_begins(left):
    expected = [(list(OPENING), [10, 11, 12]), (list(OPENING), [20, 21])]
    assert seen([ONE, OTHER], 11, left) == expected


@pytest.mark.parametrize("left", [True, False])
def test_a_system_prompt_of_the_template_itself_closes_no_question(left):
    """Behind it stands what ends questions, too, as in ChatML."""
    template = Template((5, 40, *CLOSING, 6), CLOSING)
    row = [*template.opening, 10, 11, *CLOSING, 30]
    assert seen([row], 12, left, template) == [([*template.opening], [10, 11])]


def test_the_first_tokens_of_a_long_prompt_decide():
    question = [10 + i % 50 for i in range(WINDOW + 9)]
    (found,) = seen([[*OPENING, *question, *CLOSING]], len(question) + 5, left=False)
    assert found == ([*OPENING], question[:WINDOW])


def test_a_prompt_that_opens_otherwise_shares_only_its_common_beginning():
    assert seen([[5, 6, 40, 41, *CLOSING]], 6, left=False) == [([5, 6], [40, 41])]


def test_a_prompt_without_evidence_is_left_to_its_own_tokens():
    assert seen([[*OPENING, *CLOSING]], 5, left=False) == [([], [])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_opening_takes_the_sum_of_the_log_likelihoods_of_the_evidence(dtype):
    """In 32 bits, since rounded sums of many tokens may be equal."""
    opening_rule = PromptOpening(TEMPLATE)
    rows = torch.tensor([ONE, OTHER])
    opening_rule.see(PassInput(rows, torch.ones_like(rows, dtype=torch.bool), goes_on=False))
    logits = torch.randn(16, 3).to(dtype)
    got = opening_rule.decide(lambda x: x, logits).view(2, 8, 3).softmax(-1)
    own = logits.float().view(2, 8, 3).log_softmax(-1)
    for row, evidence in ((0, [3, 4, 5]), (1, [3, 4])):
        expected = own[row, evidence].sum(0).softmax(-1)
        torch.testing.assert_close(got[row, :3], expected.expand(3, -1))
        torch.testing.assert_close(got[row, 3:], own[row, 3:].exp())


@pytest.fixture
def model(world):
    """Gates that weigh single tokens, so that every decision of the opening shows."""
    model = world.load()
    generator = torch.Generator().manual_seed(1)
    manifest = world.manifest
    gates = {
        path: (
            torch.randn(len(manifest.choices), entry.in_features, generator=generator),
            torch.zeros(len(manifest.choices)),
        )
        for path, entry in manifest.modules.items()
    }
    insert_gates(model, Gates(gates, template=TEMPLATE), manifest.router)
    return model


def test_a_batch_equals_its_rows_and_a_later_token_changes_no_decision(model):
    rows = torch.tensor([ONE, OTHER])
    with torch.no_grad():
        with recorded_logits(model) as together:
            out = model(rows).logits
        kept = {path: logits.view(2, 8, -1) for path, logits in together.items()}
        for i, row in enumerate(rows):
            with recorded_logits(model) as alone:
                torch.testing.assert_close(model(row[None]).logits[0], out[i], rtol=1e-4, atol=1e-4)
            for path, logits in alone.items():
                torch.testing.assert_close(logits, kept[path][i], rtol=1e-3, atol=1e-3)
                torch.testing.assert_close(logits[:3], logits[:1].expand(3, -1))
        longer = model(torch.cat([rows, torch.tensor([[13, 14], [15, 16]])], 1)).logits
    torch.testing.assert_close(longer[:, :8], out, rtol=1e-4, atol=1e-4)


def test_generating_with_a_cache_equals_generating_without(model):
    asked = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(2, 8).long()}
    rows = torch.tensor([ONE, OTHER])
    cached = model.generate(rows, use_cache=True, **asked)
    assert torch.equal(cached, model.generate(rows, use_cache=False, **asked))


def test_a_prompt_is_not_to_be_cut(model):
    asked = {"max_new_tokens": 2, "do_sample": False, "attention_mask": torch.ones(1, 8).long()}
    whole, rows = model.generate(torch.tensor([ONE]), **asked), torch.tensor([ONE])
    with pytest.raises(UnreadPromptError, match="prefill_chunk_size=4 cuts a prompt of 8 tokens"):
        model.generate(rows, prefill_chunk_size=4, **asked)
    assert torch.equal(model.generate(rows, prefill_chunk_size=8, **asked), whole)


def test_a_later_turn_that_begins_like_a_prompt_opens_none(model):
    """Its tokens come by themselves, as those of an answer do; here behind a cache."""
    turns = torch.tensor([[*ONE, *OPENING, 33, 34]])
    with torch.no_grad():
        whole = model(turns).logits
        first = model(turns[:, :8], use_cache=True)
        then = model(turns[:, 8:], past_key_values=first.past_key_values)
    got = torch.cat([first.logits, then.logits], 1)
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
