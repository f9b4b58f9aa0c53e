"""lm-eval's own command runs a task on a fused model, and on one expert of it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

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


def test_its_command_knows_fused_models(world: World, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": p, "choices": ["aa", "bb"]} for p in ("x", "yy", "zzz")]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "letters.yaml").write_text(TASK.format(rows=rows))
    asked = f"pretrained={world.checkpoint},base_folder={world.base},expert=q_and_v"
    said = subprocess.run(
        [
            sys.executable, "-W", "ignore", "-m", "pipelines.lm_eval_model", "run",
            "--model", "meteora", "--model_args", asked,
            "--tasks", str(tmp_path / "letters.yaml"), "--log_samples",
            "--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path / "out"),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "|letters|" in said.stdout.replace(" ", "")
    (samples,) = (tmp_path / "out").rglob("samples_letters_*.jsonl")
    weighed = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]

    import torch  # noqa: PLC0415

    import meteora  # noqa: PLC0415

    model = world.load()
    tokenizer = meteora.load(world.checkpoint, base_folder=world.base)[1]
    with meteora.force_expert(model, "q_and_v"), torch.no_grad():
        ids = tokenizer("x aa", return_tensors="pt").input_ids
        logs = model(ids).logits[0].log_softmax(-1)
    expected = sum(logs[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 4, ids.shape[1] - 1))
    assert abs(float(weighed[0][0][0]) - expected) < 1e-3
