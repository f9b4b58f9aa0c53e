"""Twenty-eight adapters, as many as the paper has: those of `tests.benchmarks.bigbench`, and more.

    python -m tests.benchmarks.twenty_eight BASE DATA TRAINED OUT [--only TASK...]
    meteora run OUT/recipe.yaml    # `router: {share: turn}` added for results/twenty_eight.md

BASE and DATA are those of `tests.benchmarks.bigbench`, and TRAINED is what that script left. OUT
gets TRAINED's fourteen adapters, one for each of three more tasks of BIG-bench and eleven of
reasoning-gym, and a recipe over all. Every task is asked 200 rows. No adapter was trained on rows
of the gates or of the tests.
"""

import argparse
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reasoning_gym
import yaml

from pipelines.stages.train_adapters import BATCH_SIZE, shuffled_for_ever
from tests.benchmarks import bigbench
from tests.benchmarks.bigbench import NUM_EXAMPLES, NUM_TEST, split
from tests.quickstart import make
from tests.quickstart.make import ATTENTION, MLP, Training

BENCHMARK = bigbench.BENCHMARK | {
    "max_new_tokens": 32,
    "conversation": [{"n": 3, "count": 67}, {"n": 10, "count": 20}],
}
LONGEST = {"language_identification": 300}
"""Characters of a prompt to train on, where a few long ones would take most of the time."""
MOST_ENTRIES = 20_000
"""So many are looked through. prime_factorization has fewer different prompts than its adapter sees
rows: some are seen again."""

TRAININGS = {
    "goal_step_wikihow": Training(8, 16, ATTENTION, steps=60),
    "language_identification": Training(16, 16, MLP, steps=60),
    "lcm": Training(4, 8, ATTENTION + MLP, steps=60),
    "tracking_shuffled_objects": Training(8, 8, ("q_proj", "v_proj"), steps=40, use_rslora=True),
    "spell_backward": Training(16, 32, ATTENTION + MLP, steps=100),
    "word_sequence_reversal": Training(4, 8, ATTENTION, steps=80),
    "letter_counting": Training(8, 16, ("q_proj", "v_proj"), steps=80),
    "gcd": Training(8, 8, MLP, steps=80),
    "prime_factorization": Training(
        4, 8, MLP, steps=80, rank_pattern={"up_proj": 8}, alpha_pattern={"up_proj": 16}
    ),
    "products": Training(16, 16, ATTENTION + MLP, steps=100),
    "number_filtering": Training(8, 16, ATTENTION, steps=70),
    "syllogism": Training(4, 4, ("q_proj", "v_proj"), steps=60, use_rslora=True),
    "family_relationships": Training(8, 16, ("k_proj", "o_proj"), steps=70),
    "fraction_simplification": Training(12, 12, ATTENTION, steps=80),
}
MADE: dict[str, dict[str, Any]] = {
    "spell_backward": {"max_word_len": 6},
    "word_sequence_reversal": {"max_words": 6},
    "letter_counting": {"max_words": 8},
    "lcm": {"max_value": 40},
    "gcd": {"max_value": 100},
    "prime_factorization": {"max_value": 500},
    "products": {"max_digits": 2},
    "number_filtering": {"max_numbers": 4, "max_decimals": 1},
    "syllogism": {},
    "family_relationships": {"max_family_size": 5},
    "fraction_simplification": {"max_value": 20, "max_factor": 10, "styles": ("plain",)},
}
"""Tasks of reasoning-gym, made easy enough for a base of 135 M parameters."""


def made(task: str, count: int) -> list[dict[str, str]]:
    """The first rows of a task of reasoning-gym whose prompts differ."""
    entries = reasoning_gym.create_dataset(task, seed=0, size=MOST_ENTRIES, **MADE[task])
    by_prompt: dict[str, dict[str, str]] = {}
    for number in range(MOST_ENTRIES):
        entry = entries[number]
        row = {"prompt": str(entry["question"]), "response": str(entry["answer"])}
        by_prompt.setdefault(row["prompt"], row)
        if len(by_prompt) == count:
            break
    return list(by_prompt.values())


def prepare(task: str, data: Path, out: Path) -> Iterator[dict[str, str]]:
    """Write a task's rows for gates and tests, and give the others to train an adapter on."""
    if task in MADE:
        rows = made(task, NUM_TEST + NUM_EXAMPLES + TRAININGS[task].steps * BATCH_SIZE)
        train_start = NUM_TEST + NUM_EXAMPLES
        make.write_rows(out / "tasks" / task / "test.jsonl", rows[:NUM_TEST])
        make.write_rows(out / "tasks" / task / "train.jsonl", rows[NUM_TEST:train_start])
        others = rows[train_start:]
    else:
        others = split(task, data, out)
    longest = LONGEST.get(task, sys.maxsize)
    short = [row for row in others if len(row["prompt"]) <= longest]
    return shuffled_for_ever(short)


def write_recipe(trained: Path, out: Path) -> None:
    shutil.copytree(trained, out, dirs_exist_ok=True)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    tasks = itertools.chain(bigbench.TRAININGS, make.TRAININGS, TRAININGS)
    recipe["experts"] = list(map(make.as_expert, tasks))
    recipe["benchmark"] = BENCHMARK
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "data", "trained", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--only", nargs="*", default=list(TRAININGS), choices=TRAININGS)
    arguments = parser.parse_args()
    for task in arguments.only:
        stream = prepare(task, arguments.data, arguments.out)
        make.train(arguments.base, task, TRAININGS[task], stream, arguments.out)
    write_recipe(arguments.trained, arguments.out)


if __name__ == "__main__":
    main()
