"""A few adapters among hundreds of others: what many experts cost, and whether they hide the few.

    python -m tests.benchmarks.hundreds TRAINED OUT --experts 256
    meteora run OUT/recipe.yaml

TRAINED is what `tests.benchmarks.bigbench` left, or the folder of the shipped quickstart. Its
adapters keep their examples and are asked their tests; nobody asks the others. Each of these is one
of TRAINED's with the channels of its matrices in another order, so shapes, norms and spectra are
those of real ones. Their rows are tasks of reasoning-gym that no adapter has, several of them close
to one that one has, and then the functions of one Python module each, asked in one of six ways.
"""

import argparse
import ast
import hashlib
import itertools
import random
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from reasoning_gym.factory import DATASETS
from safetensors.torch import load_file, save_file

from pipelines.data.row_sources import read_rows
from pipelines.data.rows import ExamplesError
from tests.benchmarks.bigbench import write_rows

LONGEST = {"prompt": 400, "response": 120}
"""Characters of a row."""
ROUTER = {"share": "layer"}
GATES = {"examples_per_expert": 64}
BENCHMARK = {
    "limit": 60,
    "max_new_tokens": 24,
    "batch_size": 30,
    "compare": ["oracle"],
    "speed": {"rounds": 7},
}
ASKED = (
    ("What does `{name}({args})` do?", "{doc}"),
    ("Write a docstring.\n\ndef {name}({args}): ...", "{doc}"),
    ("Name the function: {doc}", "{name}"),
    ("{doc}\nIt is called {name}. Give its parameters.", "{args}"),
    ("List the first four words.\n{doc}", "{words}"),
    ("# {doc}\ndef", " {name}("),
)
"""How the functions of a module are asked: prompt and response."""


def rows_of_tasks(num_rows: int) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The tasks of reasoning-gym with short questions and answers."""
    for task in sorted(set(DATASETS) - {"composite"}):  # which is made of the others
        try:
            found = read_rows(f"reasoning_gym:{task}?seed=0", Path(), 2 * num_rows)
        except ExamplesError:  # its answers are no text
            continue
        rows = fitting((row.prompt, row.response) for row in found)[:num_rows]
        if len(rows) == num_rows:
            yield task, rows


def rows_of_modules(num_rows: int) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The functions of each Python module that is installed here, in an order of no meaning."""
    roots = {Path(sysconfig.get_path(key)) for key in ("stdlib", "purelib")}
    files = {
        path.resolve(): path.relative_to(root) for root in roots for path in root.rglob("*.py")
    }
    by_hash = sorted(
        (hashlib.sha256(str(name).encode()).hexdigest(), path, name) for path, name in files.items()
    )
    for number, (digest, path, name) in enumerate(by_hash):
        if "test" in str(name) or path.stat().st_size > 400_000:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        prompt, response = ASKED[number % len(ASKED)]
        rows = fitting(
            (prompt.format_map(found), response.format_map(found)) for found in functions(tree)
        )[:num_rows]
        if len(rows) == num_rows:
            yield f"{name.stem.strip('_')}-{digest[:6]}", rows


def functions(tree: ast.AST) -> Iterator[dict[str, str]]:
    """Name, parameters, the docstring's first line, and its first words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            doc = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if len(doc) > 20:
                yield {
                    "name": node.name,
                    "args": ", ".join(arg.arg for arg in node.args.args),
                    "doc": doc,
                    "words": " ".join(doc.split()[:4]),
                }


def fitting(pairs: Iterator[tuple[str, str]]) -> list[dict[str, str]]:
    """The rows that are not too long, and ask what none before asks."""
    by_prompt: dict[str, dict[str, str]] = {}
    for prompt, response in pairs:
        row = {"prompt": prompt, "response": response}
        if all(0 < len(row[part]) <= most for part, most in LONGEST.items()):
            by_prompt.setdefault(prompt, row)
    return list(by_prompt.values())


def write_shuffled(real: Path, out: Path, seed: int) -> None:
    """An adapter with the inputs of each A, and the outputs of each B, in another order."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, tensor in sorted(load_file(real / "adapter_model.safetensors").items()):
        dim = 1 if ".lora_A." in key else 0
        order = torch.randperm(tensor.shape[dim], generator=generator)
        tensors[key] = tensor.index_select(dim, order).contiguous()
    out.mkdir(parents=True)
    shutil.copy(real / "adapter_config.json", out)
    save_file(tensors, out / "adapter_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rows", type=int, default=12, help="examples of each of the others")
    asked = parser.parse_args()
    for folder in ("adapters", "tasks"):
        shutil.copytree(asked.trained / folder, asked.out / folder)
    body = yaml.safe_load((asked.trained / "recipe.yaml").read_text())
    real = [expert["name"] for expert in body["experts"]]
    made = [
        (task, rows)
        for task, rows in itertools.islice(
            itertools.chain(rows_of_tasks(asked.rows), rows_of_modules(asked.rows)),
            asked.experts - len(real),
        )
    ]
    for number, (name, rows) in enumerate(made):
        write_shuffled(
            asked.out / "adapters" / real[number % len(real)], asked.out / "adapters" / name, number
        )
        write_rows(asked.out / "tasks" / name / "train.jsonl", rows)
        examples = f"jsonl:tasks/{name}/train.jsonl"
        body["experts"].append(
            {"name": name, "adapter": f"path:adapters/{name}", "examples": examples}
        )
    random.Random(0).shuffle(body["experts"])  # TRAINED's stand anywhere
    body |= {"router": ROUTER, "gates": GATES, "benchmark": BENCHMARK}
    (asked.out / "recipe.yaml").write_text(yaml.safe_dump(body, sort_keys=False))


if __name__ == "__main__":
    main()
