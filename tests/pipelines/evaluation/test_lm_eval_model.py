"""lm-eval's own command and ours run a task on a fused model, and on one expert of it."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import pipelines
from meteora.checkpoint.manifest import CONFIG, CONFIG_TEXT
from tests.conftest import World

TASK = """
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""

WITHOUT_ITS_TASKS = """
from functools import partial
import lm_eval.tasks
lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""
"""lm-eval's command; to find all of its own 10,000 tasks takes most of its time."""


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of three questions."""
    folder = tmp_path_factory.mktemp("letters")
    rows = folder / "rows.jsonl"
    lines = [{"prompt": p, "choices": ["aa", "bb"]} for p in ("x", "yy", "zzz")]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "letters.yaml").write_text(TASK.format(rows=rows))
    return folder / "letters.yaml"


def log_likelihoods(
    command: list[str], tasks: str, model: str, asked: str, out: Path
) -> list[float]:
    """The log-likelihood of the first choice of each question, on lm-eval's default device."""
    said = subprocess.run(
        [
            sys.executable, "-W", "ignore", *command, "run",
            "--model", model, "--model_args", asked, "--tasks", tasks, "--log_samples",
            "--batch_size", "2", "--output_path", str(out),
        ],
        capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "|letters|" in said.stdout.replace(" ", "")
    (samples,) = out.rglob("samples_letters_*.jsonl")
    found = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
    return [float(one[0][0]) for one in found]


def expected(world: World, expert: str = "") -> float:
    import torch  # noqa: PLC0415

    import meteora  # noqa: PLC0415

    model = world.load()
    tokenizer = meteora.load(world.checkpoint, base_folder=world.base)[1]
    forced = meteora.force_expert(model, expert) if expert else nullcontext()
    with forced, torch.no_grad():
        ids = tokenizer("x aa", return_tensors="pt").input_ids
        logs = model(ids).logits[0].log_softmax(-1)
    return sum(logs[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 4, ids.shape[1] - 1))


@pytest.mark.slow
def test_our_command_knows_fused_models_and_their_experts(
    world: World, letters: Path, tmp_path: Path
) -> None:
    asked = f"pretrained={world.checkpoint},base_folder={world.base},expert=q_and_v"
    found = log_likelihoods(
        ["-m", "pipelines.lm_eval_model"], str(letters), "meteora", asked, tmp_path
    )
    assert abs(found[0] - expected(world, "q_and_v")) < 1e-3


@pytest.mark.parametrize("model", ["meteora", pytest.param("hf", marks=pytest.mark.slow)])
def test_lm_evals_command_knows_fused_models_once_it_has_our_file(
    world: World, letters: Path, tmp_path: Path, model: str
) -> None:
    shutil.copytree(world.checkpoint, tmp_path / "fused")
    (tmp_path / "fused" / CONFIG).write_text(CONFIG_TEXT)
    asked = f"pretrained={tmp_path / 'fused'},base_folder={world.base}"
    command = ["-c", WITHOUT_ITS_TASKS]
    if model == "hf":  # its tokenizer gets no folder; with a base on the Hub it needs none
        asked += f",tokenizer={world.base}"
        command = ["-m", "lm_eval"]
    door = Path(pipelines.__file__).parent / "evaluation" / "lm_eval_model.yaml"
    found = log_likelihoods(command, f"{door},{letters}", model, asked, tmp_path / "out")
    assert abs(found[0] - expected(world)) < 1e-3
