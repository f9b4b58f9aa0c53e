"""An adapter that was trained hard beside the quickstart's six: does a shared opening cost it more?

    python -m tests.benchmarks.hard BASE OUT
    meteora run OUT/point.yaml
    meteora run OUT/turn.yaml

BASE is a folder with SmolLM2-135M-Instruct as safetensors. The task is to close open brackets. Its
adapter has rank 16 on q and v alone, and a high learning rate for 300 steps, so that it leans on an
opening that it computed itself.
"""

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.bigbench import write_recipe
from tests.quickstart import make
from tests.quickstart.make import NUM_TRAIN, Training, write_rows

TASK = "close_brackets"
TRAINING = Training(16, 32, ("q_proj", "v_proj"), steps=300)
PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}
NUM_TEST = 120
BENCHMARK = {
    "limit": NUM_TEST,
    "compare": ["base", "oracle"],
    "max_new_tokens": 32,
    "batch_size": 60,
}
WORDINGS = (
    "Close the brackets that are still open: {}",
    "Which brackets are missing at the end of {}",
    "{}\nComplete this sequence so that all brackets are closed.",
    "Given the brackets {}, write those that close it.",
    "{} - what has to follow until nothing is open?",
)


def rows(seed: int) -> Iterator[dict[str, str]]:
    """Brackets of which two to five are open, and what closes them; no prompt comes twice."""
    rng = random.Random(seed)
    seen = set()
    while True:
        text, stack, wanted = [], [], rng.randint(2, 5)
        while len(stack) < wanted:
            if stack and rng.random() < 0.3:
                text.append(PAIRS[stack.pop()])
            else:
                stack.append(rng.choice([*PAIRS]))
                text.append(stack[-1])
        prompt = rng.choice(WORDINGS).format(" ".join(text))
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "response": " ".join(PAIRS[b] for b in reversed(stack))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    stream = rows(make.TRAIN_SEED)
    for part, count in (("test", NUM_TEST), ("train", NUM_TRAIN)):
        write_rows(asked.out / "tasks" / TASK / f"{part}.jsonl", itertools.islice(stream, count))
    make.train(asked.base, TASK, TRAINING, stream, asked.out)
    for share in ("point", "turn"):
        router = {"kind": "gate", "share": share}
        tasks = [*make.TRAININGS, TASK]
        write_recipe(asked.out / f"{share}.yaml", tasks, router=router, benchmark=BENCHMARK)


if __name__ == "__main__":
    main()
