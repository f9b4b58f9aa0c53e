"""The paper's two settings, each as a twin that is small enough to be run here, end to end.

Recipe, sources of rows, and everything from `meteora run` on are the real ones; small are the base
(random, of the same architecture) and the number of rows. `meteora train` makes the 28 adapters.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from pipelines.recipe.recipe import Recipe, locate
from store.ledger import Ledger

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

NAMES = ("llama3-8b", "llama2-13b")
COMPOSITES = ["composite-3", "composite-3-2shot", "composite-5", "composite-10"]
DATASETS: dict[str, dict[str, tuple[str, ...]]] = {
    "tatsu-lab/alpaca": {"default": ("train",)},
    "abisee/cnn_dailymail": {"3.0.0": ("train", "test")},
    "openai/gsm8k": {"main": ("train", "test")},
    "Helsinki-NLP/news_commentary": dict.fromkeys(("de-en", "en-es", "en-it"), ("train",)),
}


def sentence(rng: random.Random) -> str:
    return " ".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(5))


def row_of(dataset: str, config: str, rng: random.Random) -> dict[str, Any]:
    if dataset == "tatsu-lab/alpaca":
        more = rng.choice(["", sentence(rng)])
        return {"instruction": sentence(rng), "input": more, "output": sentence(rng)}
    if dataset == "abisee/cnn_dailymail":
        return {"article": sentence(rng), "highlights": sentence(rng)}
    if dataset == "openai/gsm8k":
        return {"question": sentence(rng), "answer": f"So it is.\n#### {rng.randrange(99)}"}
    languages = config.split("-")
    return {"translation": {language: sentence(rng) for language in languages}}


def write_datasets(folder: Path, rng: random.Random) -> None:
    """Folders that `datasets` reads in place of the Hub's, with their names and columns."""
    for dataset, configs in DATASETS.items():
        sections = []
        for config, splits in configs.items():
            files = []
            for split in splits:
                path = folder / dataset / config / f"{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = [json.dumps(row_of(dataset, config, rng)) + "\n" for _ in range(40)]
                path.write_text("".join(rows))
                files.append({"split": split, "path": f"{config}/{split}.jsonl"})
            sections.append({"config_name": config, "data_files": files})
        card = yaml.safe_dump({"configs": sections})
        (folder / dataset / "README.md").write_text(f"---\n{card}---\n")


def write_bigbench(folder: Path, tasks: list[str], rng: random.Random) -> None:
    for task in tasks:
        for part in ("a", "b") if task == "logical_deduction" else (".",):
            examples: list[dict[str, Any]] = []
            for _ in range(40):
                scores = {sentence(rng): 0, sentence(rng): 1}
                free = {"input": sentence(rng), "target": [sentence(rng), sentence(rng)]}
                chosen = {"input": sentence(rng), "target_scores": scores}
                examples.append(free if task in {"topical_chat", "strategyqa"} else chosen)
            path = folder / "bigbench" / task / part / "task.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"examples": examples}))


def write_base(folder: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = name.startswith("llama3")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2 if small else 4,
        max_position_embeddings=8192 if small else 4096,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5 if small else 1e4},
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def twin(name: str) -> dict[str, Any]:
    """The shipped recipe with another base, fewer rows, and shorter answers."""
    body = yaml.safe_load(locate(name).read_text())
    body |= {"base": "path:base", "gates": {"method": "calibrate", "examples_per_expert": 4}}
    del body["hub"]
    asked = body["benchmark"]
    asked |= {"limit": 3, "max_new_tokens": 3, "speed": {"prompt_tokens": 8, "new_tokens": 2}}
    asked["compare"].remove("experts")  # 28 × 28 askings
    for section in asked["composite"]:
        section["count"] = 2
    for expert in body["experts"]:
        expert.pop("max_new_tokens", None)
    return body


@pytest.fixture(scope="module", params=NAMES)
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str, Path]:
    """Where one of the two settings has all that its recipe names."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    rng = random.Random(0)
    recipe = Recipe.load(locate(name))
    write_base(folder / "base", name, tokenizer)
    write_datasets(folder, rng)
    bigbench = [e.name for e in recipe.experts if (e.test or "").startswith("bigbench:")]
    assert len(bigbench) == 22
    write_bigbench(folder, bigbench, rng)
    return name, folder


def meteora(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *arguments, "--home", str(folder / "home")],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_small_twin_runs_from_end_to_end(folder: tuple[str, Path]) -> None:
    name, place = folder
    for shipped in (name, f"{name}-top2"):
        (place / f"{shipped}.yaml").write_text(yaml.safe_dump(twin(shipped), sort_keys=False))
        trained = meteora(place, "train", f"{shipped}.yaml", "--steps", "3").split()
        assert len(trained) == (28 if shipped == name else 0)
        asked = meteora(place, "run", f"{shipped}.yaml", "--dry-run")
        assert "adapters are not here, or" not in asked
        said = meteora(place, "run", f"{shipped}.yaml")
        assert "composite-10" in said
    ledger = Ledger(place / "home")
    counted = ledger.query(
        "SELECT task, count(DISTINCT subject_id) FROM scores WHERE metric NOT IN"
        " ('rougeL', 'composite_attempted') OR task IN ('alpaca', 'cnn_dailymail') GROUP BY task"
    ).rows
    # fused, and routers: each once with top_k 1 and once with 2; base, merges and oracle once; in
    # composites the oracle and the one expert for everything are routers, too
    merges = len({"ties", "dare_ties"} & {*twin(name)["benchmark"]["compare"]})
    assert dict(counted) == {
        **{expert["name"]: 2 * 5 + 1 + merges + 1 for expert in twin(name)["experts"]},
        **dict.fromkeys(COMPOSITES, 2 * 7 + 1 + merges),
    }
    kinds = dict(ledger.query("SELECT kind, count(*) FROM artifacts GROUP BY kind").rows)
    assert kinds["fused"] == 1
    assert kinds["adapter"] == 28
    routed = ledger.query("SELECT count(DISTINCT truth) FROM routing_counts")
    assert routed.rows == [(28,)]


@pytest.mark.parametrize("name", NAMES)
def test_recipes_of_one_setting_differ_in_how_many_experts_a_token_has(name: str) -> None:
    one, two = (Recipe.load(locate(f"{name}{suffix}")) for suffix in ("", "-top2"))
    for shipped in (name, f"{name}-top2"):
        assert f"`meteora train {shipped}`" in locate(shipped).read_text()
    assert (one.router.top_k, two.router.top_k) == (1, 2)
    assert one.model_copy(update={"router": two.router}) == two
    large, small = (Recipe.load(locate(name)) for name in ("llama2-13b", "llama3-8b"))
    assert (*large.benchmark.compare, "ties", "dare_ties") == small.benchmark.compare
    asked = large.benchmark.model_copy(update={"compare": small.benchmark.compare})
    assert large.model_copy(update={"base": small.base, "benchmark": asked}) == small
    assert len(one.experts) == 28
    composites = one.benchmark.composite
    assert [section.called for section in composites] == COMPOSITES
    assert [len(section.tasks) for section in composites] == [section.n for section in composites]
