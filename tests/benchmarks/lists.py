"""Adapters that answer numbered lists of their own task: what composite prompts are asked of.

    python -m tests.benchmarks.lists BASE DATA TRAINED OUT [--only TASK...]

TRAINED is what `tests.benchmarks.bigbench` left for BASE and DATA. Its adapters write one bare
answer, and to a prompt of several numbered questions one too. Here each is trained further, half
on its own rows and half on lists of two and three of them, until it numbers its answers: no adapter
ever sees a question of another's task, so that whatever answers a mixed list has to switch.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from meteora.base.loading import load_tokenizer
from pipelines.data.composites import compose
from pipelines.data.rows import Row
from tests.benchmarks.bigbench import NUM_EXAMPLES, TRAININGS, read, shuffled_for_ever
from tests.quickstart.make import TRAIN_SEED, fit, save
from tests.quickstart.make import TRAININGS as QUICKSTART
from tests.quickstart.tasks import rows as made_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

STEPS = 40
BATCH_SIZE = 4
PEAK = 1e-3
SIZES = (2, 3)


def half_in_lists(task: str, rows: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
    """A batch of rows as they are, a batch of lists of them, and so on."""
    for number in itertools.count():
        yield from itertools.islice(rows, BATCH_SIZE)
        for size in itertools.islice(itertools.cycle(SIZES), BATCH_SIZE):
            few = [Row(row["prompt"], row["response"]) for row in itertools.islice(rows, size)]
            (composite,) = compose({task: few}, size, 1, number)
            yield {"prompt": composite.prompt, "response": composite.response}


def teach(base: Path, task: str, before: Path, rows: Iterator[dict[str, str]], after: Path) -> None:
    """Train the adapter in `before` on, and leave it in `after`."""
    torch.manual_seed(TRAIN_SEED)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), before, is_trainable=True
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # twice as fast where the processor has tiles; a cache would keep the weights of the first step
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        fit(
            model,
            load_tokenizer(base),
            half_in_lists(task, rows),
            steps=STEPS,
            peak=PEAK,
            what=task,
            batch_size=BATCH_SIZE,
        )
    save(model, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=[*TRAININGS, *QUICKSTART])
    asked = parser.parse_args()
    shutil.copytree(asked.trained / "tasks", asked.out / "tasks", dirs_exist_ok=True)
    shutil.copy(asked.trained / "recipe.yaml", asked.out)
    for task in asked.only:
        if task in QUICKSTART:
            rows = made_rows(task, TRAIN_SEED)
        else:
            seen = read(asked.data / task / "train.jsonl")[:-NUM_EXAMPLES]
            rows = shuffled_for_ever(seen, seed=1)
        teach(
            asked.base,
            task,
            asked.trained / "adapters" / task,
            iter(rows),
            asked.out / "adapters" / task,
        )


if __name__ == "__main__":
    main()
