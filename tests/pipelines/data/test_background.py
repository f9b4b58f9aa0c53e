"""Text of no adapter: questions that the base answers itself, and plain text, all owned by it."""

import torch

from meteora.base.chat_template import encode_prompt
from meteora.fitting.sequences import UNLABELLED
from meteora.model.fused import without_experts
from meteora.model.generate import answer_all
from pipelines.data.background import MAX_NEW_TOKENS, background_rows
from pipelines.data.labels import Labeller
from pipelines.data.rows import Row


def test_the_shipped_texts_are_many_and_of_both_kinds():
    rows = background_rows()
    questions = [row for row in rows if row.prompt]
    texts = [row for row in rows if not row.prompt]
    assert len(questions) > 90
    assert len(texts) > 20
    assert len({row.prompt or row.response for row in rows}) == len(rows)
    assert all(bool(row.prompt) != bool(row.response) for row in rows)


def test_the_base_answers_the_questions_itself(world, tokenizer):
    model = world.load()
    rows = [Row("why?", ""), Row("", "plain text"), Row("and a longer question?", "")]
    done = []
    short, long, plain = Labeller(tokenizer).background(model, rows, 4, done.append)
    assert sum(done) == len(rows)
    assert plain.input_ids == tuple(tokenizer("plain text").input_ids)
    for row, sequence in ((rows[0], short), (rows[2], long)):
        asked = encode_prompt(tokenizer, row.prompt)
        with torch.no_grad(), without_experts(model):
            out = model.generate(
                torch.tensor([asked]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
            )
        assert list(sequence.input_ids) == out[0].tolist()
    for sequence in (short, long, plain):
        assert set(sequence.experts) == {4}
        assert UNLABELLED not in sequence.experts


def test_without_a_chat_template_the_first_token_is_nobodys_as_in_the_experts_rows(
    world, tokenizer
):
    row, nobody = Row("why?", ""), 5
    labeller = Labeller(tokenizer, nobody=nobody)
    of_base = labeller.background(world.load(), [row, Row("", "plain text")], 4)
    for sequence in (*of_base, *labeller.rows([row], 0)):
        assert sequence.experts[0] == nobody
        assert nobody not in sequence.experts[1:]


def test_many_prompts_are_answered_as_one_by_one(world, tokenizer):
    model = world.load()
    prompts = [encode_prompt(tokenizer, text) for text in ("a", "bcd", "efghij")]
    with without_experts(model):
        together = answer_all(model, tokenizer, prompts, 6)
        assert together == [answer_all(model, tokenizer, [ids], 6)[0] for ids in prompts]
