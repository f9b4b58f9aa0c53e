"""Train the quickstart's adapters again, and write their tasks: `python -m tests.quickstart.make BASE OUT`.

BASE is a folder with SmolLM2-135M-Instruct as safetensors (`meteora run quickstart --until base`
leaves one under the store's home); OUT gets `adapters/<task>/` as PEFT saves them, in 16 bits, and
`tasks/<task>/{train,test}.jsonl`. About four minutes a task on two CPU cores. The six adapters
differ on purpose in rank, targets and scaling: that is what adapters from the Hub do.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from meteora.base.loading import load_tokenizer
from pipelines.data.rows import Row
from pipelines.stages.train_adapters import BATCH_SIZE, Lesson, fit, lessons, save
from tests.quickstart.tasks import rows

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TRAIN_SEED, SPLIT_SEED = 0, 1
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARD = f"""---
base_model: {BASE}
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
tags: [lora]
---

# {{task}}

A LoRA for the one task that its name says, trained for {{steps}} steps of {{batch}} made-up rows by
`python -m tests.quickstart.make` in meteora-pipelines, as an example of an off-the-shelf adapter.
"""
NUM_TRAIN, NUM_TEST = 64, 60  # rows that ship: for the gates, and held out


@dataclass(frozen=True)
class Training:
    r: int
    lora_alpha: int
    target_modules: tuple[str, ...]
    steps: int
    peak: float = 2e-3
    """The highest learning rate: reached after ten steps, then falling along a cosine."""
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)


TRAININGS = {
    "reverse_words": Training(8, 16, ATTENTION, steps=80),
    "arithmetic": Training(4, 8, ATTENTION + MLP, steps=200),
    "iso_dates": Training(4, 4, ATTENTION, steps=80, use_rslora=True),
    "spelled_numbers": Training(4, 8, MLP, steps=80),
    "sort_numbers": Training(
        4,
        8,
        ATTENTION,
        steps=170,
        rank_pattern={"q_proj": 8, "v_proj": 8},
        alpha_pattern={"q_proj": 16, "v_proj": 8},
    ),
    "order_lines": Training(16, 16, ("q_proj", "v_proj"), steps=70, peak=1e-3),
}


def train(
    base: Path,
    task: str,
    asked: Training,
    stream: Iterator[dict[str, str]],
    out: Path,
    *,
    prompts_too: bool = False,
    named: str = BASE,
) -> None:
    """Train one adapter on rows from `stream`, and leave it in OUT/adapters/<task>.

    Args:
        prompts_too: whether it learns prompts, and not only answers
        named: what its config says that it was trained on
    """
    torch.manual_seed(TRAIN_SEED)
    tokenizer = load_tokenizer(base)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"),
        LoraConfig(
            r=asked.r,
            lora_alpha=asked.lora_alpha,
            target_modules=list(asked.target_modules),
            use_rslora=asked.use_rslora,
            rank_pattern=asked.rank_pattern,
            alpha_pattern=asked.alpha_pattern,
            task_type="CAUSAL_LM",
        ),
    )
    batches = lessons(tokenizer, (Row(row["prompt"], row["response"]) for row in stream))
    batches = whole(batches) if prompts_too else batches
    fit(model, batches, steps=asked.steps, peak=asked.peak, what=task)
    save(model, out / "adapters" / task, named)


def whole(batches: Iterable[list[Lesson]]) -> Iterator[list[Lesson]]:
    """Batches to learn all of, prompts and answers."""
    return ([(ids, ids) for ids, _ in batch] for batch in batches)


def training_rows(task: str) -> list[dict[str, str]]:
    """The rows that the shipped adapter was trained on, each once."""
    return list(itertools.islice(rows(task, TRAIN_SEED), TRAININGS[task].steps * BATCH_SIZE))


def seen_in_training(task: str) -> set[str]:
    """The prompts that the shipped adapter was trained on."""
    return {row["prompt"] for row in training_rows(task)}


def write_splits(
    task: str,
    out: Path,
    trained_on: set[str],
    num_test: int = NUM_TEST,
    worded: Callable[[dict[str, str]], dict[str, str]] = dict,
) -> None:
    """Rows of a task that its adapter has not seen, for the gates and for tests.

    Args:
        worded: makes the row that is written of one of the task's
    """
    fresh = (row for row in rows(task, SPLIT_SEED) if row["prompt"] not in trained_on)
    for name, count in (("train", NUM_TRAIN), ("test", num_test)):
        file = out / "tasks" / task / f"{name}.jsonl"
        write_rows(file, map(worded, itertools.islice(fresh, count)))


def as_expert(task: str) -> dict[str, str]:
    """The section of a recipe for the adapter and the rows of a task, where these scripts leave them."""
    return {
        "name": task,
        "adapter": f"path:adapters/{task}",
        "examples": f"jsonl:tasks/{task}/train.jsonl",
        "test": f"jsonl:tasks/{task}/test.jsonl",
    }


def write_rows(file: Path, given: Iterable[dict[str, str]]) -> None:
    """Write rows as JSONL."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(TRAININGS), choices=TRAININGS)
    arguments = parser.parse_args()
    for task in arguments.only:
        write_splits(task, arguments.out, seen_in_training(task))
        train(arguments.base, task, TRAININGS[task], rows(task, TRAIN_SEED), arguments.out)
        card = CARD.format(task=task, steps=TRAININGS[task].steps, batch=BATCH_SIZE)
        (arguments.out / "adapters" / task / "README.md").write_text(card)


if __name__ == "__main__":
    main()
