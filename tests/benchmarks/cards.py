"""Gates from the data sets that the adapters' own cards name.

    python -m tests.benchmarks.cards OUT HOME [--only right mixed ...]

The quickstart's six adapters get cards that name data sets on a Hub of this machine, each in other
columns, and the recipe says nothing about examples. The rows of the data sets are of the adapters'
tasks: none is a test row, an example that ships, or a row that an adapter was trained on. The cases
are in `CASES`. OUT gets adapters, recipes and `runs.txt`, what each run said of its examples; HOME
has the results. A second call takes what is there.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pyarrow import Table
from pyarrow.parquet import write_table

from pipelines.evaluation.measurements import FUSED, ORACLE
from pipelines.workspace.context import RunContext
from tests.benchmarks.bigbench import SHIPPED, read
from tests.benchmarks.controls import recorded_values
from tests.benchmarks.paired import difference, mean_score
from tests.benchmarks.timing import table, tell
from tests.pipelines.hub.hub_server import Main, running_hub
from tests.quickstart import make, tasks

DATA_SEED, NUM_ROWS = 2, 200
HURT = "iso_dates"
"""The adapter whose card is wrong, in cases where one is."""
MIXED, FOREIGN = "cards/mixed", "cards/letters"
LABELS, RIGHT = "labels", "right"
OWN = {task: f"cards/{task}" for task in make.TRAININGS}
CASES: dict[str, dict[str, str]] = {
    LABELS: {},
    RIGHT: OWN,
    "one foreign": OWN | {HURT: FOREIGN},
    "one other": OWN | {HURT: OWN["sort_numbers"]},
    "one mixed": OWN | {HURT: MIXED},
    "all mixed": dict.fromkeys(OWN, MIXED),
    "none": dict.fromkeys(OWN, ""),
}
"""The data set that each adapter's card names. `labels` is the quickstart itself, with the examples
that ship; `foreign` is a task of none of the six; `other` that of another of the six; `mixed` has
rows of all six; with `none` the adapters have to write their prompts themselves."""
SAID = ("of the data set", "no examples", "write no questions", "card", "Routing accuracy")

Row = dict[str, str]


def data_rows(task: str) -> list[Row]:
    """New rows of a task."""
    known = make.seen_in_training(task)
    for split in ("train", "test"):
        known |= {row["prompt"] for row in read(SHIPPED / "tasks" / task / f"{split}.jsonl")}
    fresh = (row for row in tasks.rows(task, DATA_SEED) if row["prompt"] not in known)
    return list(islice(fresh, NUM_ROWS))


def letters() -> list[Row]:
    """Rows of a task that no adapter knows."""
    return [
        {"prompt": f"How many letters has the word {word}?", "response": str(len(word))}
        for word in tasks.WORDS
    ]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = BytesIO()
    write_table(Table.from_pylist(rows), file)
    return file.getvalue()


def turn(who: str, text: str) -> dict[str, str]:
    return {"role": who, "content": text}


def in_parquet(rows: list[Row]) -> dict[str, bytes]:
    named = [
        {"id": i, "question": r["prompt"], "answer": r["response"]} for i, r in enumerate(rows)
    ]
    return {
        "data/test-00000-of-00001.parquet": parquet(named[-20:]),
        "data/train-00000-of-00001.parquet": parquet(named[:-20]),
    }


def in_messages(rows: list[Row]) -> dict[str, bytes]:
    system = turn("system", "You are good at sums.")
    talks = [[turn("user", row["prompt"]), turn("assistant", row["response"])] for row in rows]
    return {
        "train.jsonl": jsonl([{"messages": [system] * (i % 2) + t} for i, t in enumerate(talks)])
    }


def in_instructions(rows: list[Row]) -> dict[str, bytes]:
    named = [
        {"instruction": r["prompt"], "input": ["", None][i % 2], "output": r["response"]}
        for i, r in enumerate(rows)
    ]
    return {"data.json": json.dumps(named).encode()}


def in_completions(rows: list[Row]) -> dict[str, bytes]:
    named = [
        {"prompt": [turn("user", r["prompt"])], "completion": [turn("assistant", r["response"])]}
        for r in rows
    ]
    return {"train.jsonl": jsonl(named)}


def in_preferences(rows: list[Row]) -> dict[str, bytes]:
    named = [
        {"prompt": r["prompt"], "chosen": r["response"], "rejected": r["response"][::-1]}
        for r in rows
    ]
    return {"data/train-00000-of-00001.parquet": parquet(named)}


def in_capitals(rows: list[Row]) -> dict[str, bytes]:
    card = "configs:\n- config_name: other\n  data_files: other.jsonl\n"
    card += "- config_name: main\n  default: true\n  data_files: main.jsonl\n"
    named = [{"Question": r["prompt"], "Answer": r["response"]} for r in rows]
    return {
        "README.md": f"---\n{card}---\n".encode(),
        "main.jsonl": jsonl([{"Question": None, "Answer": "?"}, *named]),
        "other.jsonl": jsonl([{"text": "another config"}]),
    }


SHAPES = dict(
    zip(
        make.TRAININGS,
        (in_instructions, in_messages, in_parquet, in_completions, in_preferences, in_capitals),
        strict=True,
    )
)


def data_sets() -> dict[str, Main]:
    """The repositories of the Hub."""
    rows = {task: data_rows(task) for task in make.TRAININGS}
    mixed = [row for own in rows.values() for row in own]
    random.Random(DATA_SEED).shuffle(mixed)
    found = {OWN[task]: SHAPES[task](own) for task, own in rows.items()}
    found |= {MIXED: in_parquet(mixed), FOREIGN: in_messages(letters())}
    return {name: Main(files, card={"license": "mit"}) for name, files in found.items()}


def write_case(out: Path, case: str) -> Path:
    """Write the adapters of a case, with their cards, and its recipe."""
    body = yaml.safe_load((SHIPPED / "recipe.yaml").read_text())
    body["benchmark"] |= {"conversation": [], "compare": []}
    for expert in body["experts"]:
        task = expert["name"]
        for key in ("adapter", "examples", "test"):
            kind, _, path = expert[key].partition(":")
            expert[key] = f"{kind}:{SHIPPED / path}"
        if case == LABELS:
            continue
        folder = out / case.replace(" ", "_") / task
        shutil.copytree(SHIPPED / "adapters" / task, folder, dirs_exist_ok=True)
        name = CASES[case][task]
        (folder / "README.md").write_text(f"---\nlicense: mit\ndatasets: [{name}]\n---\n")
        expert |= {"adapter": f"path:{folder.absolute()}", "examples": "auto"}
    if case == LABELS:
        body["benchmark"]["compare"] = ["base", ORACLE, "arrow", "norm"]
    path = out / f"{case.replace(' ', '_')}.yaml"
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def run(out: Path, home: Path, case: str, env: Mapping[str, str]) -> None:
    """Run a case, and write what it says of its examples."""
    words = [sys.executable, "-m", "pipelines.cli", "run", str(write_case(out, case))]
    done = subprocess.run(
        [*words, "--home", str(home)], check=False, capture_output=True, text=True, env=env
    )
    said = [
        line for line in (done.stderr + done.stdout).splitlines() if any(s in line for s in SAID)
    ]
    if done.returncode:
        said += ["FAILED", *done.stderr.splitlines()[-12:]]
    with (out / "runs.txt").open("a") as file:
        file.write("\n".join([f"## {case}", *said, "", ""]))


def values(out: Path, home: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """What each system's answers are worth, by task and row."""
    for case in CASES:
        path = out / f"{case.replace(' ', '_')}.yaml"
        if path.is_file():
            work = RunContext.open(str(path), home)
            systems = ("base", "arrow", "norm", ORACLE) if case == LABELS else ()
            for system in (*systems, FUSED):
                if found := recorded_values(work, system):
                    yield (case if system == FUSED else system), found


def show(out: Path, home: Path) -> None:
    """Print the scores, and the differences from gates by labels and from the right adapter."""
    found = dict(values(out, home))
    rows = []
    for system, own in found.items():
        means = [f"{mean_score([own[task]]):.2f}" for task in make.TRAININGS]
        compared = [
            difference([(own[task], found[other][task]) for task in make.TRAININGS])
            for other in (LABELS, ORACLE)
        ]
        mean = f"{mean_score(own[task] for task in make.TRAININGS):.3f}"
        rows.append([system, *means, mean, *compared])
    heads = ["system", *make.TRAININGS, "mean", "less labels", "less the right adapter"]
    tell(table(heads, rows), "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("home", type=Path)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--show", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.show:
        show(asked.out, asked.home)
        return
    asked.out.mkdir(parents=True, exist_ok=True)
    with running_hub() as hub:
        hub.repos |= data_sets()
        env = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(asked.out.absolute() / "hf"),
        }
        for case in asked.only:
            run(asked.out, asked.home, case, env)
        words = [sys.executable, "-m", "tests.benchmarks.cards", asked.out, asked.home, "--show"]
        subprocess.run(words, check=True, env=env)


if __name__ == "__main__":
    main()
