"""Gates from the data sets that the adapters' own cards name.

    python -m tests.benchmarks.cards OUT HOME [--only right "all mixed" ...]
    python -m tests.benchmarks.cards OUT HOME --judge CHECKPOINT BASE [--rows 64]
    python -m tests.benchmarks.cards OUT HOME --know CHECKPOINT BASE

The quickstart's six adapters get cards that name data sets on a Hub of this machine, each in other
columns, and the recipe says nothing about examples. The rows of the data sets are of the adapters'
tasks: none is a test row, an example that ships, or a row that an adapter was trained on. The cases
are in `CASES`. OUT gets adapters, recipes and `runs.txt`, what each run said of its examples; HOME
has the results. A second call takes what is there. The other commands print how well the adapters
know the rows, by the likelihood of the answers, or by the weights, as a run finds it; CHECKPOINT is
one of these adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from pyarrow import Table
from pyarrow.parquet import write_table

import meteora
from meteora.base.chat_template import encode_pair, encode_prompt
from meteora.model.fused import force_expert, without_experts
from pipelines.data import pool
from pipelines.evaluation.measurements import FUSED, ORACLE
from pipelines.workspace.context import RunContext
from tests.benchmarks.bigbench import SHIPPED, read
from tests.benchmarks.controls import recorded_values
from tests.benchmarks.paired import difference, mean_score
from tests.benchmarks.timing import table, tell
from tests.pipelines.hub.hub_server import Main, running_hub
from tests.quickstart import make, tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
SAID = (
    "of the data set",
    "in common",
    "no examples",
    "write no questions",
    "Routing accuracy",
    "Most tokens",
)

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
    shapes = {OWN[task]: shape for task, shape in SHAPES.items()}
    shapes |= {MIXED: in_parquet, FOREIGN: in_messages}
    sets = {name: shapes[name](rows) for name, rows in rows_by_name().items()}
    return {name: Main(files, card={"license": "mit"}) for name, files in sets.items()}


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


def run_all(out: Path, home: Path, cases: Sequence[str]) -> None:
    """Run cases over a Hub, and print what there is then; a finished run asks the Hub, too."""
    out.mkdir(parents=True, exist_ok=True)
    with running_hub() as hub:
        hub.repos |= data_sets()
        env = os.environ | {"HF_HOME": str(out.absolute() / "hf"), "HF_ENDPOINT": hub.endpoint}
        for case in cases:
            run(out, home, case, env)
        words = [sys.executable, "-m", "tests.benchmarks.cards", out, home, "--show"]
        subprocess.run(words, check=True, env=env)


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


def rows_by_name() -> dict[str, list[Row]]:
    """The rows of each data set."""
    rows = {task: data_rows(task) for task in make.TRAININGS}
    mixed = [row for own in rows.values() for row in own]
    random.Random(DATA_SEED).shuffle(mixed)
    return {OWN[task]: own for task, own in rows.items()} | {MIXED: mixed, FOREIGN: letters()}


@torch.inference_mode()
def likelihoods(model: PreTrainedModel, asked: Sequence[tuple[list[int], int]]) -> list[float]:
    """The mean log-probability of each answer, in nats a token.

    Args:
        asked: of each row, prompt and answer as token ids, and where the answer begins
    """
    longest = max(len(ids) for ids, _ in asked)
    padded = torch.tensor([ids + ids[-1:] * (longest - len(ids)) for ids, _ in asked])
    logits = model(padded, use_cache=False).logits.float()  # causal: what comes later is not seen
    return [
        own[start - 1 : len(ids) - 1]
        .log_softmax(-1)
        .gather(1, torch.tensor(ids[start:])[:, None])
        .mean()
        .item()
        for own, (ids, start) in zip(logits, asked, strict=True)
    ]


def judge(checkpoint: Path, base: Path, num_rows: int) -> None:
    """Print how well each adapter's own weights know the rows of each data set."""
    model, tokenizer = meteora.load(checkpoint, base_folder=base)
    sets = {name: rows[:num_rows] for name, rows in rows_by_name().items()}
    gains, best = [], []
    for name, rows in sets.items():
        asked = [
            (
                encode_pair(tokenizer, row["prompt"], row["response"]),
                len(encode_prompt(tokenizer, row["prompt"])),
            )
            for row in rows
        ]
        with without_experts(model):
            found = [likelihoods(model, asked)]
        for task in make.TRAININGS:
            with force_expert(model, task):
                found.append(likelihoods(model, asked))
        values = np.array(found)
        gains.append([name, *(f"{one:+.2f}" for one in (values[1:] - values[0]).mean(1))])
        first = values[1:].argmax(0)
        best.append([name, *(f"{np.mean(first == e):.2f}" for e in range(len(make.TRAININGS)))])
    tell(table(["gain, nats a token", *make.TRAININGS], gains), "cpu")
    tell(table(["the best adapter", *make.TRAININGS], best), "cpu")


def know(checkpoint: Path, base: Path) -> None:
    """Print the share of rows that each adapter knows by its weights, as a run finds it."""
    model, tokenizer = meteora.load(checkpoint, base_folder=base)
    sets, names, lines = rows_by_name(), list(make.TRAININGS), []
    for case, named in CASES.items():
        own = {task: [row["prompt"] for row in sets[name]] for task, name in named.items() if name}
        if own:
            shares = pool.known_shares(model, tokenizer, own, names)
            lines.append([case, *(f"{shares[task]:.2f}" for task in names)])
    tell(table(["case", *names], lines), "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("home", type=Path)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--show", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--judge", type=Path, nargs=2, metavar=("CHECKPOINT", "BASE"))
    parser.add_argument("--know", type=Path, nargs=2, metavar=("CHECKPOINT", "BASE"))
    parser.add_argument("--rows", type=int, default=64, help="of a data set, to judge it by")
    asked = parser.parse_args()
    if asked.judge:
        judge(*asked.judge, asked.rows)
    elif asked.know:
        know(*asked.know)
    elif asked.show:
        show(asked.out, asked.home)
    else:
        run_all(asked.out, asked.home, asked.only)


if __name__ == "__main__":
    main()
