"""Measure a model on rows of text: lm-eval is the harness, we bring rows, metric and statistics."""

from __future__ import annotations

import math
import time
import unicodedata
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import datasets
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from meteora.encode import Template, encode_pair
from meteora.model import expert_names
from meteora.observe import recorded_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from pipelines.examples import Row

EXACT_MATCH = "exact_match"
Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: two sides make 95 %."""


@dataclass(frozen=True)
class Measured:
    """A score of one model on one task, and every row that it was made of."""

    value: float
    stderr: float
    low: float
    high: float
    num_samples: int
    harness: str
    wall_seconds: float
    outputs: tuple[dict[str, Any], ...]
    """Of each row in order: prompt, reference, output, and the metric's value."""

    def write_outputs(self, path: Path) -> None:
        datasets.Dataset.from_list(list(self.outputs)).to_parquet(path)


def normalise(text: str) -> str:
    """What exact match compares: Unicode NFC, white space at the ends off, runs of it one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def exact_match(output: str, reference: str) -> float:
    """1 where the normalised texts are equal; an empty output is as wrong as any other."""
    return float(normalise(output) == normalise(reference))


def wilson(successes: float, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927); a bootstrap fails at 0 and at 1."""
    share = successes / total
    scale = 1 + Z95**2 / total
    centre = (share + Z95**2 / (2 * total)) / scale
    half = Z95 / scale * math.sqrt(share * (1 - share) / total + Z95**2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


class _Harnessed(HFLM):
    """lm-eval's own model class; it reports rows as they are done, through our bar."""

    advance: Callable[[int], None] = staticmethod(lambda _rows: None)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        out = super()._model_generate(context, *args, **kwargs)
        self.advance(len(context))
        return out


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _rows: None,
) -> Measured:
    """Greedy answers of a live model to `rows`, scored by exact match.

    Args:
        model: as it is routed now
        task: the name under which lm-eval reports
        rows: asked in order, each in the chat template where the tokenizer has one
        max_new_tokens: an answer ends there, or at the end of sequence
        advance: called with the number of rows that were just answered
    """
    started = time.perf_counter()
    harnessed = _Harnessed(
        pretrained=model,
        tokenizer=cast("PreTrainedTokenizerFast", tokenizer),
        batch_size=batch_size,
        device=str(model.device),
    )
    harnessed.advance = advance
    table = datasets.Dataset.from_list([row.to_dict() for row in rows])
    report = simple_evaluate(
        model=harnessed,
        tasks=[
            {
                "task": task,
                "custom_dataset": lambda **_: {"test": table},
                "test_split": "test",
                "output_type": "generate_until",
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "{{response}}",
                "generation_kwargs": {
                    "until": [tokenizer.eos_token],
                    "max_gen_toks": max_new_tokens,
                    "do_sample": False,
                },
                "process_results": lambda doc, results: {
                    EXACT_MATCH: exact_match(results[0], doc["response"])
                },
                "metric_list": [
                    {"metric": EXACT_MATCH, "aggregation": "mean", "higher_is_better": True}
                ],
            }
        ],
        task_manager=TaskManager(include_defaults=False),  # its own 10,000 tasks take 10 s to index
        apply_chat_template=bool(tokenizer.chat_template),
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        bootstrap_iters=0,
    )
    samples = sorted(report["samples"][task], key=lambda sample: sample["doc_id"])
    values = [float(sample[EXACT_MATCH]) for sample in samples]
    value = sum(values) / len(values)
    low, high = wilson(sum(values), len(values))
    return Measured(
        value=value,
        stderr=math.sqrt(value * (1 - value) / max(1, len(values) - 1)),
        low=low,
        high=high,
        num_samples=len(values),
        harness=f"lm-eval {version('lm-eval')}",
        wall_seconds=time.perf_counter() - started,
        outputs=tuple(
            {
                "prompt": sample["doc"]["prompt"],
                "reference": sample["doc"]["response"],
                "output": sample["filtered_resps"][0],
                EXACT_MATCH: value,
            }
            for sample, value in zip(samples, values, strict=True)
        ),
    )


def count_routes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _rows: None,
) -> dict[str, list[int]]:
    """Where the tokens of some rows are sent: for each routed module, how many to each expert.

    Prompt and answer are fed as they stand; the template's opening, the same in front of every
    prompt, is left out, since no router could tell anything from it.
    """
    opening = len(Template.of(tokenizer).opening)
    num_experts = len(expert_names(model))
    counts: dict[str, torch.Tensor] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        encoded = [encode_pair(tokenizer, row.prompt, row.response) for row in batch]
        longest = max(map(len, encoded))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for i, own in enumerate(encoded):
            ids[i, : len(own)] = torch.tensor(own)
        place = torch.arange(longest)
        there = place < torch.tensor([len(own) for own in encoded])[:, None]  # [B, L]
        asked = (there & (place >= opening)).flatten()
        with torch.inference_mode(), recorded_logits(model) as logits:
            model(
                input_ids=ids.to(model.device),
                attention_mask=there.long().to(model.device),
                logits_to_keep=1,
            )
        for path, scores in logits.items():
            chosen = scores[asked].argmax(-1)
            found = torch.bincount(chosen, minlength=num_experts).cpu()
            counts[path] = counts[path] + found if path in counts else found
        advance(len(batch))
    return {path: total.tolist() for path, total in counts.items()}
