"""Prompts that experts without examples write themselves.

    <|user|> ______ <|end|>     the expert fills the gap, with no other text before it

An adapter trained on whole conversations has learnt their questions, too, and writes such questions
into the gap (Magpie, arXiv 2406.08464). An adapter trained on answers alone writes answers there,
or the text of its base. Two likelihoods tell questions from answers: a question of the expert's
task is likelier in the gap than its answer is, and likelier for the expert than for the base.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

import torch
from lm_eval.models.utils import resolve_max_length
from torch import BoolTensor, Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from meteora.base.chat_template import Template, encode_prompt
from meteora.base.placement import input_device
from meteora.model.fused import force_expert, without_experts
from meteora.model.generate import answer_all, end_tokens, generate_ids, prompts_at_once
from pipelines.data.background import MAX_NEW_TOKENS
from pipelines.data.claims import Claim
from pipelines.workspace.console import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 256
"""The longest prompt; a longer one is left out."""
JUDGED, AT_ONCE = 16, 64
"""The texts of an expert's first batch, which decides about it, and of each later batch."""
ENDED = 7 / 8
"""A batch stops when this share of its texts has ended; the others are left out as too slow."""
TOP_P = 0.95
"""Nucleus sampling: leaves out the tail of unlikely tokens, which spoil a prompt."""
LEAST_GAIN, LEAST_LEAD = 1.25, 0.25
"""Thresholds in nats a token, for the means of `Claim.score` and `Claim.lead` over the first
batch. The quickstart's adapters, trained on answers, stay below one of them. Five of six adapters
trained on whole conversations reach 1.93 and 0.56 or more; the sixth, which has learnt its task
least, reaches 1.56 and -0.04. See `tests/benchmarks/results/written_prompts.md`."""
LEAST_DIFFERENT = 1 / 4
"""The share of the first batch that has to be whole and different: those twelve adapters have 12 to
15 of 16. An expert that writes its one answer again and again has few."""


def write_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    count: int,
    *,
    seed: int = 0,
) -> dict[str, list[Claim]]:
    """Have each expert write prompts: samples from an opened user's turn, at temperature 1.

    Args:
        model: with its experts; its routers are left as they are
        names: of the experts that write
        count: the prompts that each expert begins; without questions it stops after one batch
        seed: of the samples; PyTorch's own generators are left as they are

    Returns:
        Different prompts by expert, in the order of writing, each with the expert's own answer. An
        empty list for an expert that writes no questions, and for all without a chat template,
        which marks the end of a prompt.
    """
    template = Template.of(tokenizer)
    prompts: dict[str, list[Claim]] = {name: [] for name in names}
    if not template.opening or not template.question_end:
        return prompts
    devices = [input_device(model)] if input_device(model).type == "cuda" else []
    with bar("writing prompts", count * len(names), "prompts") as advance:
        for place, name in enumerate(names):
            with force_expert(model, name), torch.random.fork_rng(devices):
                torch.manual_seed(seed + place)
                prompts[name] = _write(model, tokenizer, template, name, count)
            advance(count)
    return prompts


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    name: str,
    count: int,
) -> list[Claim]:
    """The prompts of the expert that all tokens are routed to."""
    prompts: dict[str, Claim] = {}
    sizes = [min(JUDGED, count), *[AT_ONCE] * ((count - JUDGED) // AT_ONCE)]
    sizes.append(count - sum(sizes))
    for place, number in enumerate(filter(None, sizes)):
        texts = _sample(model, tokenizer, template, number)
        new = _judged(model, tokenizer, template, name, texts)
        if place == 0 and not _are_questions(new, number):
            return []
        prompts |= {one.prompt: one for one in new if one.score >= LEAST_GAIN}
    return [*prompts.values()]


def _are_questions(written: Sequence[Claim], begun: int) -> bool:
    """Whether an expert that began so many texts, and wrote these, has learnt questions."""
    if len(written) < max(2, begun * LEAST_DIFFERENT):
        return False
    gain = sum(one.score for one in written) / len(written)
    lead = sum(one.lead for one in written) / len(written)
    return gain >= LEAST_GAIN and lead >= LEAST_LEAD


class _MostEnded(StoppingCriteria):
    """Ends a batch [B, L] when most of its rows have an end token after column `start`."""

    def __init__(self, ends: Collection[int], start: int) -> None:
        self.ends, self.start = torch.tensor([*ends]), start

    def __call__(self, input_ids: Tensor, _scores: object, **_kwargs: object) -> BoolTensor:
        ended = torch.isin(input_ids[:, self.start :], self.ends.to(input_ids.device)).any(1)
        is_over = ended.float().mean().item() >= ENDED
        return cast("BoolTensor", torch.full_like(ended, is_over))


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, count: int
) -> list[str]:
    """Texts sampled after the template's opening; only complete ones, without special tokens."""
    ends = {*end_tokens(model, tokenizer), template.question_end[0]}
    number, rows = prompts_at_once(model, count), []
    ids = torch.tensor([template.opening] * number, device=input_device(model))
    while len(rows) < count:
        with torch.inference_mode():
            out = generate_ids(
                model,
                tokenizer,
                ids,
                min(MAX_TOKENS, max(1, resolve_max_length(model.config, tokenizer) - ids.shape[1])),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=TOP_P,
                eos_token_id=sorted(ends),
                stopping_criteria=StoppingCriteriaList([_MostEnded(ends, ids.shape[1])]),
            )
        rows += out[:, ids.shape[1] :].tolist()
    special, texts = set(tokenizer.all_special_ids), []
    for row in rows:
        end = next((place for place, token in enumerate(row) if token in ends), 0)
        if not special & set(row[:end]):
            texts.append(str(tokenizer.decode(row[:end])).strip())
    return [text for text in dict.fromkeys(texts) if text]


def _judged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    name: str,
    texts: Sequence[str],
) -> list[Claim]:
    """Texts with the model's answers, and the likelihoods that tell questions from answers.

    Those that do not fit into the base's context, with an answer, are left out.
    """
    most = resolve_max_length(model.config, tokenizer) - MAX_NEW_TOKENS
    ids_of = {text: encode_prompt(tokenizer, text) for text in texts}
    texts = [text for text, ids in ids_of.items() if len(ids) <= most]
    prompts = [ids_of[text] for text in texts]
    ends = end_tokens(model, tokenizer)
    answers = [
        [token for token in ids if token not in ends]
        for ids in answer_all(model, tokenizer, prompts, MAX_NEW_TOKENS)
    ]
    start, end = len(template.opening), len(template.closing)
    judged = []
    for text, ids, answer in zip(texts, prompts, answers, strict=True):
        question = ids[start : len(ids) - end]
        own = _likelihood(model, template.opening, question)
        with without_experts(model):
            gain = own - _likelihood(model, template.opening, question)
        lead = own - _likelihood(model, template.opening, answer) if answer else 0.0
        answer_text = str(tokenizer.decode(answer, skip_special_tokens=True))
        judged.append(Claim(text, name, 0, round(gain, 3), round(lead, 3), answer_text))
    return judged


@torch.inference_mode()
def _likelihood(model: PreTrainedModel, opening: Sequence[int], ids: Sequence[int]) -> float:
    """The mean log-probability of tokens after an opening, in nats a token."""
    row = torch.tensor([[*opening, *ids]], device=input_device(model))
    logits = model(row, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
    own = logits.log_softmax(-1).gather(1, row[0, -len(ids) :, None].to(logits.device))
    return own.mean().item()
