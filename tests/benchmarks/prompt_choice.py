"""A recipe of adapters and tests alone, from one with examples.

    python -m tests.benchmarks.prompt_choice RECIPE OUT.yaml [--null]
    meteora run OUT.yaml --home HOME

It takes the examples out, and gives the recipe the router `prompt`.
"""

import argparse
from pathlib import Path

import yaml

from pipelines.recipe.recipe import locate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=locate)
    parser.add_argument("out", type=Path)
    parser.add_argument("--null", action="store_true", help="the base is a choice, too")
    arguments = parser.parse_args()
    body = yaml.safe_load(arguments.recipe.read_text())
    for expert in body["experts"]:
        expert.pop("examples", None)
        for key in {"adapter", "test"} & set(expert):
            kind, _, path = expert[key].partition(":")
            expert[key] = f"{kind}:{(arguments.recipe.parent / path).absolute()}"
    body.pop("gates", None)
    body["router"] = {"kind": "prompt", "null": arguments.null}
    arguments.out.write_text(yaml.safe_dump(body, sort_keys=False))


if __name__ == "__main__":
    main()
