"""Adapters for real tasks of BIG-bench, and a recipe over them: what the tables here are made on.

    python -m tests.benchmarks.bigbench BASE DATA OUT [--only TASK...]
    meteora run OUT/recipe.yaml

BASE is a folder with SmolLM2-135M-Instruct as safetensors, DATA has `<task>/{train,test}.jsonl` of
{"prompt", "response"} (BIG-bench, Apache-2.0; not shipped here). OUT gets `adapters/`, `tasks/` and
`recipe.yaml`: the adapters trained here and the quickstart's own, fourteen in all. Adapters differ
in rank, targets and scaling, as those of strangers do. Every task is asked 200 rows. No adapter was
trained on rows of the gates or of the tests.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.recipe.recipe import locate
from pipelines.stages.train_adapters import shuffled_for_ever
from tests.quickstart.make import (
    ATTENTION,
    MLP,
    Training,
    as_expert,
    seen_in_training,
    train,
    training_rows,
    write_rows,
    write_splits,
)
from tests.quickstart.make import TRAININGS as QUICKSTART

SHIPPED = locate("quickstart").parent
NUM_TEST, NUM_EXAMPLES = 200, 64
GATES = {"examples_per_expert": 64}
BENCHMARK = {
    "limit": NUM_TEST,
    "max_new_tokens": 24,
    "batch_size": 30,
    "conversation": [{"n": 3, "count": 200}, {"n": 10, "count": 100}],
    "compare": ["oracle"],
}

TRAININGS = {
    "valid_parentheses": Training(8, 16, ATTENTION, steps=120),
    "unit_addition": Training(4, 8, ATTENTION + MLP, steps=160),
    "epistemic_reasoning": Training(16, 16, ("q_proj", "v_proj"), steps=100),
    "colored_objects": Training(8, 8, ATTENTION, steps=120, use_rslora=True),
    "winowhy": Training(4, 8, MLP, steps=80),
    "si_conversion": Training(8, 16, MLP, steps=120),
    "object_counting": Training(
        4, 8, ATTENTION, steps=120, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 16}
    ),
    "strategyqa": Training(2, 4, ATTENTION + MLP, steps=80, peak=1e-3),
}


def read(path: Path) -> list[dict[str, str]]:
    """Rows of one file; `choices` are left to who asks for them."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts(task: str, data: Path) -> tuple[list[dict[str, str]], ...]:
    """A task's rows to train an adapter on, for gates, and for tests.

    BIG-bench's own test rows are fewer than `NUM_TEST`; the end of its train file has the rest.
    """
    test, train = (read(data / task / f"{name}.jsonl") for name in ("test", "train"))
    gates_end = len(train) - (NUM_TEST - len(test))
    train_end = gates_end - NUM_EXAMPLES
    return train[:train_end], train[train_end:gates_end], test + train[gates_end:]


def split(task: str, data: Path, out: Path) -> list[dict[str, str]]:
    """Write a task's rows for gates and tests, and give the others to train an adapter on."""
    training, gates, test = parts(task, data)
    write_rows(out / "tasks" / task / "train.jsonl", gates)
    write_rows(out / "tasks" / task / "test.jsonl", test)
    return training


def rows_trained_on(task: str, data: Path) -> list[dict[str, str]]:
    """The rows that an adapter of this script, or of the quickstart, was trained on."""
    return training_rows(task) if task in QUICKSTART else parts(task, data)[0]


def write_recipe(file: Path, tasks: Sequence[str], **sections: Any) -> None:
    """Write a recipe for tasks, those of the quickstart among them, whose files come beside it."""
    for folder in ("adapters", "tasks"):
        shutil.copytree(SHIPPED / folder, file.parent / folder, dirs_exist_ok=True)
    shipped = yaml.safe_load((SHIPPED / "recipe.yaml").read_text())
    body = {"base": shipped["base"], "experts": list(map(as_expert, tasks)), **sections}
    file.write_text(yaml.safe_dump(body, sort_keys=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(TRAININGS), choices=TRAININGS)
    arguments = parser.parse_args()
    for task in arguments.only:
        stream = shuffled_for_ever(split(task, arguments.data, arguments.out))
        train(arguments.base, task, TRAININGS[task], stream, arguments.out)
    tasks = [*TRAININGS, *QUICKSTART]
    write_recipe(arguments.out / "recipe.yaml", tasks, gates=GATES, benchmark=BENCHMARK)
    for task in QUICKSTART:
        write_splits(task, arguments.out, seen_in_training(task), NUM_TEST)


if __name__ == "__main__":
    main()
