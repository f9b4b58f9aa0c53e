"""Adapters that answer numbered lists among other people's questions: what composites are asked of.

    python -m tests.benchmarks.lists BASE OUT [--only TASK...]
    meteora run OUT/recipe.yaml

BASE is a folder with SmolLM2-135M-Instruct as safetensors. The quickstart's adapters write one bare
answer, and to several numbered questions one too. Here each is trained on lists of three, five and
ten questions, of which half are its own task's. The others, with their right answers, are foreign
text: tasks of reasoning-gym that no expert has. An adapter learns what it has to predict while its
own question is answered, and nothing else. None sees a question of another expert, so whatever
answers a mixed list has to switch. OUT gets `adapters/`, `tasks/` and `recipe.yaml`; about six
minutes a task on two CPU cores. For another BASE, `--recipe` names what
`tests.benchmarks.other_bases` left: `OUT/point.yaml`.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from meteora.base.chat_template import encode_prompt
from meteora.base.loading import load_tokenizer
from pipelines.data.composites import Question, number_questions
from pipelines.data.row_sources import read_rows
from pipelines.data.rows import Row
from pipelines.recipe.recipe import locate
from pipelines.stages.train_adapters import IGNORED, fit, lesson, save
from tests.quickstart.make import NUM_TRAIN, TRAIN_SEED, seen_in_training, write_splits
from tests.quickstart.make import TRAININGS as QUICKSTART
from tests.quickstart.tasks import rows as made_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from pipelines.data.composites import Composite
    from pipelines.stages.train_adapters import Lesson

PEAK = 2e-3
STEPS = 180
LONGER = {"arithmetic": 200, "sort_numbers": 200}
"""Steps of tasks that are harder to learn."""
SIZES = {10: 2, 5: 4, 3: 5, 1: 8}
"""How many lists of so many questions are a batch: about a thousand tokens. One is no list."""
BATCHES = (10, 5, 10, 3, 10, 1)
"""Questions in the lists of one batch after the other."""
FOREIGN = [
    "coin_flip",
    "complex_arithmetic",
    "count_bits",
    "count_primes",
    "fraction_simplification",
    "gcd",
    "lcm",
    "letter_counting",
    "number_filtering",
    "number_sequence",
    "prime_factorization",
    "simple_equations",
    "spell_backward",
    "syllogism",
    "time_intervals",
    "calendar_arithmetic",
]
NUM_FOREIGN = 4000
LONGEST = 200
"""Characters of a foreign question."""
NUM_TEST = 240
NUM_COMPOSITES = 128
GATES = {"examples_per_expert": NUM_TRAIN, "composites": [3, 5, 10]}


def foreign_rows(rng: random.Random) -> Iterator[Row]:
    """Short questions of the foreign tasks in random order, for ever."""
    each = NUM_FOREIGN // len(FOREIGN) * 2  # some are too long
    by_task = [read_rows(f"reasoning_gym:{name}?seed=0", Path(), each) for name in FOREIGN]
    short = [row for few in zip(*by_task, strict=True) for row in few if len(row.prompt) < LONGEST]
    few = short[:NUM_FOREIGN]
    rng.shuffle(few)
    return itertools.cycle(few)


def draw_list(
    task: str, own: Iterator[Row], foreign: Iterator[Row], n: int, rng: random.Random
) -> Composite:
    """A list of `n` questions; each is the task's with a chance of a half, and one at least is."""
    is_own = [rng.random() < 0.5 for _ in range(n)]
    if not any(is_own):
        is_own[rng.randrange(n)] = True
    return number_questions(
        [Question(task, next(own)) if mine else Question("", next(foreign)) for mine in is_own]
    )


def list_lesson(tokenizer: PreTrainedTokenizerBase, composite: Composite, task: str) -> Lesson:
    """What `oracle` asks of the task's adapter: the tokens that follow a token of its question.

    So it learns its answers, and the number that comes after each. It begins a list that its own
    question begins.
    """
    ids, owners = composite.encode(tokenizer)
    start = len(encode_prompt(tokenizer, composite.prompt))
    before = [composite.questions[0].task if owner is None else owner for owner in owners]
    labels = [
        token if place >= start and before[place - 1] == task else IGNORED
        for place, token in enumerate(ids)
    ]
    return ids, labels


def batches(
    task: str, tokenizer: PreTrainedTokenizerBase, own: Iterator[Row]
) -> Iterator[list[Lesson]]:
    """Lists of each size in turn, and rows as they are."""
    rng = random.Random(TRAIN_SEED)
    foreign = foreign_rows(rng)
    for n in itertools.cycle(BATCHES):
        if n == 1:
            yield [lesson(tokenizer, row) for row in itertools.islice(own, SIZES[n])]
        else:
            drawn = (draw_list(task, own, foreign, n, rng) for _ in range(SIZES[n]))
            yield [list_lesson(tokenizer, composite, task) for composite in drawn]


def benchmark(rows: int, composites: int) -> dict[str, Any]:
    """What is asked: `rows` of each task, and so many composites of three and of ten of them."""
    return {
        "limit": rows,  # composites are made of these: by default so many that none comes twice
        "max_new_tokens": 32,
        "batch_size": 32,
        "composite": [{"n": n, "count": composites} for n in (3, 10)],
        "compare": ["oracle", "one_expert"],
    }


def teach(base: Path, task: str, adapter: Path, out: Path, share: float) -> None:
    """Train `adapter` on for a share of its steps; write unseen rows for its gates and tests."""
    seen = seen_in_training(task)

    def own() -> Iterator[Row]:
        for row in made_rows(task, TRAIN_SEED):
            seen.add(row["prompt"])
            yield Row(row["prompt"], row["response"])

    torch.manual_seed(TRAIN_SEED)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        adapter,
        is_trainable=True,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    lists = batches(task, load_tokenizer(base), own())
    # twice as fast where the processor has tiles; a cache would keep the weights of the first step
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        fit(model, lists, steps=int(LONGER.get(task, STEPS) * share), peak=PEAK, what=task)
    named = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    save(model, out / "adapters" / task, str(named))
    write_splits(task, out, seen, NUM_TEST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", type=Path, default=locate("quickstart"), help="has adapters")
    parser.add_argument("--only", nargs="*", default=list(QUICKSTART), choices=QUICKSTART)
    parser.add_argument("--steps", type=float, default=1.0, help="share of the full training")
    parser.add_argument("--limit", type=int, default=NUM_TEST, help="rows a task")
    parser.add_argument("--composites", type=int, default=NUM_COMPOSITES, help="of each length")
    asked = parser.parse_args()
    for task in asked.only:
        adapter = asked.recipe.parent / "adapters" / task
        teach(asked.base, task, adapter, asked.out, asked.steps)
    known = yaml.safe_load(asked.recipe.read_text())
    taught = [e for e in known["experts"] if (asked.out / "adapters" / e["name"]).is_dir()]
    asks = benchmark(asked.limit, asked.composites)
    body = {"base": known["base"], "experts": taught, "gates": GATES, "benchmark": asks}
    (asked.out / "recipe.yaml").write_text(yaml.safe_dump(body, sort_keys=False))


if __name__ == "__main__":
    main()
