"""Where the tokens of composites go, with the right answers given: share at their own expert.

    python -m tests.benchmarks.list_routes TASKS CHECKPOINT
        [--questions 10] [--num-fewshot 0] [--prompts 16]

TASKS has a `NAME/test.jsonl` of each expert, such as the folder `tasks` that
`tests.benchmarks.lists` leaves. Shares are over modules and tokens: of the prompt, of the numbers
in front of answers, of the first token behind a number, and of the rest of the answers.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch

import meteora
from meteora.base.chat_template import encode_prompt
from meteora.model.fused import expert_names
from pipelines.data.composites import answer_openings, compose, encode_composite
from pipelines.data.row_sources import read_rows
from tests.benchmarks.rejoin import chosen
from tests.quickstart.make import TRAININGS

NUM_ROWS = 240


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("tasks", "checkpoint"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--num-fewshot", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=16)
    asked = parser.parse_args()
    model, tokenizer = meteora.load(asked.checkpoint)
    names = expert_names(model)
    folder = asked.tasks.absolute()
    rows = {n: read_rows(f"jsonl:{folder / n}/test.jsonl", Path(), NUM_ROWS) for n in TRAININGS}
    shares: dict[str, list[float]] = defaultdict(list)
    for composite in compose(rows, asked.questions, asked.prompts, 0, asked.num_fewshot):
        ids, owners = encode_composite(tokenizer, composite)
        choices = chosen(model, ids)
        numbers = {*answer_openings(tokenizer, composite)}
        answer = len(encode_prompt(tokenizer, composite.prompt))
        for place, owner in enumerate(owners):
            if owner is None:
                continue
            if place < answer:
                part = "prompt"
            elif place in numbers:
                part = "numbers of answers"
            elif place - 1 in numbers:
                part = "first tokens of answers"
            else:
                part = "other tokens of answers"
            own = (choices[:, place] == names.index(owner)).float()
            shares[part].append(float(own.mean()))
    for part, found in shares.items():
        print(f"{part}: {sum(found) / len(found):.3f} of {len(found)} tokens")


if __name__ == "__main__":
    main()
