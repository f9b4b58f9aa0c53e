"""The quickstart's six tasks on a base without a chat template.

    python -m tests.benchmarks.plain_base BASE OUT
    meteora run OUT/point.yaml
    meteora run OUT/turn.yaml

BASE is a folder with a model as safetensors; its name is the base's in the adapters. OUT gets one
adapter a task, trained as the quickstart's are but in half as many steps, and two recipes. A prompt
is the task's, with an "Answer:" on a line of its own, where a chat template would have opened the
answer.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import yaml

from tests.quickstart import make
from tests.quickstart.tasks import rows

NUM_TEST = 120
BENCHMARK = {
    "limit": NUM_TEST,
    "compare": ["base", "oracle", "arrow"],
    "max_new_tokens": 32,
    "batch_size": 60,
}


def as_text(row: dict[str, str]) -> dict[str, str]:
    """A row as plain text."""
    return {"prompt": f"{row['prompt']}\nAnswer:", "response": f" {row['response']}"}


def write_recipe(base: Path, out: Path, share: str) -> None:
    body = {
        "base": f"path:{base.absolute()}",
        "experts": list(map(make.as_expert, make.TRAININGS)),
        "router": {"kind": "gate", "share": share},
        "benchmark": BENCHMARK,
    }
    (out / f"{share}.yaml").write_text(yaml.safe_dump(body, sort_keys=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(make.TRAININGS), choices=make.TRAININGS)
    asked = parser.parse_args()
    for task in asked.only:
        seen = make.seen_in_training(task)
        make.write_splits(task, asked.out, seen, NUM_TEST, worded=as_text)
        stream = map(as_text, rows(task, make.TRAIN_SEED))
        training = make.TRAININGS[task]
        training = replace(training, steps=training.steps // 2)
        make.train(asked.base, task, training, stream, asked.out, named=asked.base.name)
    for share in ("point", "turn"):
        write_recipe(asked.base, asked.out, share)


if __name__ == "__main__":
    main()
