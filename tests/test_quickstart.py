"""The main job on the real base, SmolLM2-135M-Instruct, with real adapters: two of them, few rows.

The base comes out of the Python package that the README installs; nothing is downloaded here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import yaml

import meteora
from meteora.adapters import reader
from meteora.artifacts import SHARED
from meteora.kernels import onednn
from pipelines.recipe.recipe import locate
from tests.conftest import load_peft, peft_is_behind
from tests.pipelines.cli.command_line import meteora as meteora_says
from tests.pipelines.cli.names import THIS_MACHINE, looked_up, watching
from tests.pipelines.reports.html_reader import Elements

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel
    from transformers import BatchEncoding, PreTrainedModel

README = Path(__file__).parent.parent / "README.md"
QUICKSTART = locate("quickstart").parent
EXPERTS = ("iso_dates", "order_lines")
PROMPT = "Convert this date to ISO format: March 3, 2021."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def ran(home: Path) -> subprocess.CompletedProcess[str]:
    """`meteora run` on a recipe like the quickstart's, with two experts and few rows.

    Every process of it is watched, Prefect's own server among them.
    """
    body = yaml.safe_load(locate("quickstart").read_text())
    body["experts"] = [expert for expert in body["experts"] if expert["name"] in EXPERTS]
    for expert in body["experts"]:
        for key in ("adapter", "examples", "test"):
            kind, _, path = expert[key].partition(":")
            expert[key] = f"{kind}:{QUICKSTART / path}"
    body["gates"] |= {"examples_per_expert": 8, "conversations": [1, 2]}
    body["benchmark"] |= {"limit": 6, "conversation": [{"n": 2, "count": 1}]}
    recipe = home / "two.yaml"
    recipe.write_text(yaml.safe_dump(body))
    command = [sys.executable, "-m", "pipelines.cli", "run", str(recipe), "--home", str(home)]
    env = watching(home / "watch")
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done


def run(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    done = meteora_says(*words, home=home)
    assert done.returncode == 0, done.stderr
    return done


def test_the_run_ends_with_scores_routes_and_a_checkpoint(
    home: Path, ran: subprocess.CompletedProcess[str]
) -> None:
    for said in ("iso_dates", "order_lines", "mean", "Routing accuracy", "checkpoint: "):
        assert said in ran.stdout
    assert "fitting the gates: 30 of 30 layers" in ran.stderr
    scores = json.loads(
        run(home, "sql", "FROM leaderboard WHERE router = 'gate'", "--format", "json").stdout
    )
    assert {row["task"] for row in scores} == {*EXPERTS, "conversation-2"}
    (conversations,) = (row for row in scores if row["task"] not in EXPERTS)
    assert conversations["num_samples"] == 1
    for row in scores:
        if row is conversations:
            continue
        assert row["num_samples"] == 6
        assert row["base_value"] <= 0.34  # two of six: the base cannot do it
        assert row["oracle_value"] >= 0.66
        assert row["value"] >= row["oracle_value"] - 0.34


def test_a_run_looks_up_no_name_but_this_machine_s(
    home: Path, ran: subprocess.CompletedProcess[str]
) -> None:
    assert "nothing to do" not in ran.stderr
    assert looked_up(home / "watch") <= THIS_MACHINE


def test_run_again_finds_everything_in_the_ledger(
    home: Path, ran: subprocess.CompletedProcess[str]
) -> None:
    again = run(home, "run", home / "two.yaml")
    assert "nothing to do" in again.stderr
    table, first = (text.partition("Routing accuracy")[0] for text in (again.stdout, ran.stdout))
    assert table == first


def test_the_checkpoint_answers_by_its_id(
    home: Path, ran: subprocess.CompletedProcess[str]
) -> None:
    digest = ran.stdout.partition("recorded as router:")[2][:12]
    assert run(home, "generate", digest, PROMPT).stdout.strip() == "2021-03-03"


def test_the_report_shows_the_answers_token_by_token(
    home: Path, ran: subprocess.CompletedProcess[str]
) -> None:
    digest = ran.stdout.partition("recorded as router:")[2][:12]
    page = home / "report.html"
    assert run(home, "report", digest, "-o", page, "--traces", "2").stdout.strip() == str(page)
    html = page.read_text()
    assert len(html) < 1_000_000
    traces = [data for data in Elements(html).json() if "pieces" in data]
    assert len(traces) == 2
    conversation, single = ("".join(one["pieces"]) for one in traces)
    assert conversation.count("<|im_start|>user") == 2  # the conversation, whole
    assert single.count("<|im_start|>user") == 1
    assert "in ISO notation?" in single
    assert traces[0]["experts"] == [*EXPERTS, SHARED]


def test_the_readme_s_python_works(ran: subprocess.CompletedProcess[str]) -> None:
    """Pasted as it stands, with the folder that the run printed; its base comes by reference."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    folder = ran.stdout.partition("checkpoint: ")[2].splitlines()[0]
    command = [sys.executable, "-c", code.replace("CHECKPOINT", folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "2021-03-03" in done.stdout


ADAPTERS = {path.name: path for path in sorted((QUICKSTART / "adapters").iterdir())}


@pytest.fixture(scope="module")
def both(
    home: Path,
    ran: subprocess.CompletedProcess[str],
    tmp_path_factory: pytest.TempPathFactory,
    fuse_adapters: Callable[..., object],
) -> tuple[PreTrainedModel, PeftModel, BatchEncoding]:
    """The real base in float32 with every adapter, as ours and as PEFT's, and a prompt."""
    assert ran.returncode == 0
    (base,) = (home / "bases").iterdir()
    fused = tmp_path_factory.mktemp("fused")
    fuse_adapters(base, ADAPTERS, fused)
    model, tokenizer = meteora.load(fused, base_folder=base)
    theirs = load_peft(base, next(iter(ADAPTERS.values())))
    with peft_is_behind():
        for name, folder in ADAPTERS.items():
            theirs.load_adapter(folder, name)
    onednn.use_in(theirs)  # sums that are rounded alike
    return model, theirs.eval(), tokenizer(PROMPT, return_tensors="pt")


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_adapter_forced_equals_peft_with_it(
    both: tuple[PreTrainedModel, PeftModel, BatchEncoding], name: str
) -> None:
    """Though all are stacked: the same logits within 1e-5 of their range."""
    model, theirs, tokens = both
    assert reader.check(ADAPTERS[name]).verdict == "accept"
    theirs.set_adapter(name)
    with torch.inference_mode(), meteora.force_expert(model, name):
        ours, expected = model(**tokens).logits, theirs(**tokens).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_adapters_differ_in_what_adapters_differ_in() -> None:
    """Ranks 4, 8 and 16; q and v, attention, all seven; rsLoRA; patterns. And they are small."""
    specs = {p.name: reader.read(p).spec for p in (QUICKSTART / "adapters").iterdir()}
    sizes = [p.stat().st_size for p in QUICKSTART.glob("adapters/*/*.safetensors")]
    assert len(specs) >= 6
    assert {4, 8, 16} <= {module.r for spec in specs.values() for module in spec.modules}
    targets = {frozenset(m.path.rsplit(".", 1)[1] for m in s.modules) for s in specs.values()}
    assert {2, 4, 7} <= {len(names) for names in targets}
    assert any(spec.use_rslora for spec in specs.values())
    assert any(len({m.r for m in spec.modules}) > 1 for spec in specs.values())
    assert max(sizes) <= 3_000_000
    assert sum(sizes) <= 12_000_000
