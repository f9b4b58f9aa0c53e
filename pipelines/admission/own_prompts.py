"""Prompts that experts write themselves, where they come without examples.

    <|user|> ______ <|end|>     the expert goes on from here, and nothing else is given

An adapter that was trained on whole conversations has learnt their questions, too, and writes such
questions there (Magpie, arXiv 2406.08464). One that was trained on answers alone writes its answers
there, or what its base writes. What is written tells which it was: questions of the expert's task
are likelier in that place than its answers to them, and likelier for the expert than for the base.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import BoolTensor, Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from meteora.base.chat_template import Template, encode_prompt
from meteora.base.placement import input_device
from meteora.model.fused import force_expert, without_experts
from meteora.model.generate import answer_all, end_tokens, generate_ids
from pipelines.data.labels import MAX_NEW_TOKENS
from pipelines.workspace.console import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 256
"""Of a prompt; one that does not end by then is left out."""
JUDGED, AT_ONCE = 16, 64
"""Texts of an expert by which it is judged, and those that it then writes in one batch."""
ENDED = 7 / 8
"""Of a batch: when so many have ended, the others are left out, since few would hold up all."""
TOP_P = 0.95
"""What is drawn from: without the tail of unlikely tokens, which spoil a prompt."""
LEAST_GAIN, LEAST_LEAD = 1.25, 0.25
"""Nats a token, by which questions are likelier for the expert than for the base, and likelier than
the answers to them in the user's place. The quickstart's adapters, which were trained on answers,
are below one of them. Five of six that were trained on whole conversations have 1.93 and 0.56 or
more, and the sixth, which has learnt its task least, 1.56 and -0.04. See
`tests/benchmarks/results/written_prompts.md`."""


@dataclass(frozen=True)
class Written:
    """A prompt that an expert wrote, and its own answer to it."""

    prompt: str
    answer: str
    gain: float
    """How much likelier the prompt is for the expert than for the base, in nats a token."""
    lead: float
    """How much likelier it is in the user's place than the answer would be there."""


def write_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    count: int,
    *,
    seed: int = 0,
) -> dict[str, list[Written]]:
    """Have each expert write prompts: samples from an opened user's turn, at temperature 1.

    Args:
        model: with its experts; its routers are left as they are
        names: of the experts that write
        count: how many each of them begins; one that writes no questions stops after a batch
        seed: of the draws; PyTorch's own generators are left as they are

    Returns:
        Different prompts by expert, in the order in which they were written. None of an expert that
        writes no questions. None at all without a chat template: where a prompt ends is not known.
    """
    template = Template.of(tokenizer)
    found: dict[str, list[Written]] = {name: [] for name in names}
    if not template.opening or not template.question_end:
        return found
    devices = [input_device(model)] if input_device(model).type == "cuda" else []
    with bar("writing prompts", count * len(names), "prompts") as advance:
        for place, name in enumerate(names):
            with force_expert(model, name), torch.random.fork_rng(devices):
                torch.manual_seed(seed + place)
                found[name] = _write(model, tokenizer, template, count)
            advance(count)
    return found


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, count: int
) -> list[Written]:
    """The prompts of the expert that has all tokens."""
    found: dict[str, Written] = {}
    sizes = [min(JUDGED, count), *[AT_ONCE] * ((count - JUDGED) // AT_ONCE)]
    sizes.append(count - sum(sizes))
    for place, number in enumerate(filter(None, sizes)):
        texts = _sample(model, tokenizer, template, number)
        new = _judged(model, tokenizer, template, texts)
        if place == 0 and not _are_questions(new):
            return []
        found |= {one.prompt: one for one in new if one.gain >= LEAST_GAIN}
    return [*found.values()]


def _are_questions(written: Sequence[Written]) -> bool:
    """Whether an expert that wrote this has learnt questions; one text alone shows nothing."""
    gain = sum(one.gain for one in written) / max(1, len(written))
    lead = sum(one.lead for one in written) / max(1, len(written))
    return len(written) > 1 and gain >= LEAST_GAIN and lead >= LEAST_LEAD


class _MostEnded(StoppingCriteria):
    """Ends a batch when most of its rows [B, L] have ended, behind the first tokens."""

    def __init__(self, ends: Collection[int], start: int) -> None:
        self.ends, self.start = torch.tensor([*ends]), start

    def __call__(self, input_ids: Tensor, _scores: object, **_given: object) -> BoolTensor:
        ended = torch.isin(input_ids[:, self.start :], self.ends.to(input_ids.device)).any(1)
        is_over = ended.float().mean().item() >= ENDED
        return cast("BoolTensor", torch.full_like(ended, is_over))


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template, count: int
) -> list[str]:
    """Texts that are written from the template's opening, and end; none has special tokens."""
    ends = {*end_tokens(model, tokenizer), template.question_end[0]}
    ids = torch.tensor([template.opening] * count, device=input_device(model))
    with torch.inference_mode():
        out = generate_ids(
            model,
            tokenizer,
            ids,
            MAX_TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=TOP_P,
            eos_token_id=sorted(ends),
            stopping_criteria=StoppingCriteriaList([_MostEnded(ends, ids.shape[1])]),
        )
    special, texts = set(tokenizer.all_special_ids), []
    for row in out[:, ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), 0)
        if not special & set(row[:end]):
            texts.append(str(tokenizer.decode(row[:end])).strip())
    return [text for text in dict.fromkeys(texts) if text]


def _judged(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    texts: Sequence[str],
) -> list[Written]:
    """Texts with the model's answers to them, and how likely both are in the user's place."""
    asked = [encode_prompt(tokenizer, text) for text in texts]
    ends = end_tokens(model, tokenizer)
    answers = [
        [token for token in ids if token not in ends]
        for ids in answer_all(model, tokenizer, asked, MAX_NEW_TOKENS)
    ]
    start, end = len(template.opening), len(template.closing)
    found = []
    for text, ids, answer in zip(texts, asked, answers, strict=True):
        question = ids[start : len(ids) - end]
        own = _likelihood(model, template.opening, question)
        with without_experts(model):
            gain = own - _likelihood(model, template.opening, question)
        lead = own - _likelihood(model, template.opening, answer) if answer else 0.0
        said = str(tokenizer.decode(answer, skip_special_tokens=True))
        found.append(Written(text, said, round(gain, 3), round(lead, 3)))
    return found


@torch.inference_mode()
def _likelihood(model: PreTrainedModel, opening: Sequence[int], ids: Sequence[int]) -> float:
    """The mean log-probability of tokens behind an opening, in nats."""
    row = torch.tensor([[*opening, *ids]], device=input_device(model))
    logits = model(row, use_cache=False, logits_to_keep=len(ids) + 1).logits[0, :-1].float()
    own = logits.log_softmax(-1).gather(1, row[0, -len(ids) :, None].to(logits.device))
    return own.mean().item()
