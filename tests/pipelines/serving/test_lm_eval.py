"""lm-eval's own command evaluates a served model, and has the benchmark's answers and scores."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from meteora.model.fused import without_experts
from pipelines.evaluation.harness import Harness
from tests.pipelines.serving.conftest import serving

TASK = """
task: echoes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: response
generation_kwargs: {{until: [], max_gen_toks: 8}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
PROMPTS = ["one", "two and two", "three", "four, at last"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("tiny", "chat"), ("tiny:(base)", "chat"), ("tiny", "text")]
)
def test_lm_evals_command_has_the_answers_of_the_benchmark(
    chat, tmp_path: Path, monkeypatch, name: str, kind: str
) -> None:
    path, client = "chat/completions", ["local-chat-completions", "--apply_chat_template"]
    settings = ""
    if kind == "text":
        monkeypatch.setattr(chat.tokenizer, "chat_template", None)
        path, client = "completions", ["local-completions"]
        settings = ",tokenizer_backend=None,tokenized_requests=False"
    with without_experts(chat.model) if "base" in name else nullcontext():
        harness = Harness(chat.model, chat.tokenizer, batch_size=1)
        answers = [text for text, _ in harness.generate(PROMPTS, 8)]
    rows = tmp_path / "rows.jsonl"
    right = [*answers[:3], "another"]
    lines = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, right, strict=True)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "echoes.yaml").write_text(TASK.format(rows=rows))
    with serving(chat) as address:
        said = subprocess.run(
            [
                sys.executable, "-W", "ignore", "-m", "lm_eval",
                "--model", *client,
                "--model_args", f"model={name},base_url={address}/v1/{path}{settings}",
                "--tasks", str(tmp_path / "echoes.yaml"),
                "--log_samples", "--output_path", str(tmp_path / "out"),
            ],
            capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    assert said.returncode == 0, said.stderr
    (samples,) = (tmp_path / "out").rglob("samples_echoes_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert {one["doc"]["prompt"]: one["resps"][0][0] for one in found} == (
        dict(zip(PROMPTS, answers, strict=True))
    )
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["echoes"]["exact_match,none"] == 0.75
