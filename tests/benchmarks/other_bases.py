"""The quickstart's six tasks on another base.

    python -m tests.benchmarks.other_bases BASE OUT [--limit 60] [--compare base oracle]
    meteora run OUT/point.yaml
    meteora run OUT/turn.yaml

BASE is a folder with a model as safetensors; its name is the base's in the adapters. OUT gets one
adapter a task, trained as the quickstart's are but in fewer steps, and two recipes for the adapters
that are there. If the base has no chat template, a prompt is the task's, with an "Answer:" on a
line of its own, where a template would have opened the answer.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from meteora.base.loading import load_tokenizer
from tests.quickstart import make
from tests.quickstart.tasks import rows

NUM_TEST = 120
BENCHMARK = {"max_new_tokens": 32, "batch_size": 60}


def as_text(row: dict[str, str]) -> dict[str, str]:
    """A row as plain text."""
    return {"prompt": f"{row['prompt']}\nAnswer:", "response": f" {row['response']}"}


def write_recipe(base: Path, out: Path, share: str, benchmark: dict[str, Any]) -> None:
    """Write OUT/<share>.yaml."""
    trained = [task for task in make.TRAININGS if (out / "adapters" / task).is_dir()]
    body = {
        "base": f"path:{base.absolute()}",
        "experts": list(map(make.as_expert, trained)),
        "router": {"kind": "gate", "share": share},
        "benchmark": benchmark,
    }
    (out / f"{share}.yaml").write_text(yaml.safe_dump(body, sort_keys=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(make.TRAININGS), choices=make.TRAININGS)
    parser.add_argument("--steps", type=float, default=0.5, help="share of the quickstart's")
    parser.add_argument("--limit", type=int, default=NUM_TEST, help="rows a task")
    parser.add_argument("--compare", nargs="+", default=["base", "oracle", "arrow"])
    asked = parser.parse_args()
    chats = load_tokenizer(asked.base).chat_template is not None
    worded = dict if chats else as_text
    for task in asked.only:
        seen = make.seen_in_training(task)
        make.write_splits(task, asked.out, seen, NUM_TEST, worded=worded)
        stream = map(worded, rows(task, make.TRAIN_SEED))
        training = make.TRAININGS[task]
        training = replace(training, steps=int(training.steps * asked.steps))
        make.train(asked.base, task, training, stream, asked.out, named=asked.base.name)
    benchmark = {"limit": asked.limit, "compare": asked.compare, **BENCHMARK}
    if chats:
        benchmark["conversation"] = [{"n": 3, "count": asked.limit // 2}]
    for share in ("point", "turn"):
        write_recipe(asked.base, asked.out, share, benchmark)


if __name__ == "__main__":
    main()
