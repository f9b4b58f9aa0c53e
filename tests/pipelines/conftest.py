"""A recipe over a tiny real world: a base, PEFT's adapters and rows, all in one folder."""

# ruff: noqa: PLC0415

from __future__ import annotations

import json
import random
import shutil
import string
from dataclasses import dataclass, replace
from itertools import count
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest
import yaml

from pipelines.recipe.recipe import Recipe
from pipelines.recipe.stage import Stage
from pipelines.workspace.context import RunContext, new_run_id
from store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping
    from pathlib import Path

    from selenium import webdriver
    from transformers import PreTrainedTokenizerBase

    from meteora.artifacts import BuiltBase
    from pipelines.planning.plan import Plan
    from pipelines.reports.summary import Summary
    from tests.conftest import World
    from tests.pipelines.hub.hub_server import HubServer


def letters(expert: str, seed: int, count: int) -> list[dict[str, str]]:
    """Rows that a byte tokenizer can tell apart: every expert has an alphabet of its own."""
    alphabet = {"q_and_v": "abcd", "attention": "wxyz"}[expert]
    rng = random.Random(f"{expert}/{seed}")
    return [
        {"prompt": "".join(rng.choices(alphabet, k=12)), "response": rng.choice(alphabet) * 3}
        for _ in range(count)
    ]


class Here:
    """A run's stages in the test's own process: one of their own takes seconds to start."""

    def __init__(self, work: RunContext, **_told: object) -> None:
        self._work = replace(
            work, ledger=Ledger(work.home)
        )  # nothing is shared but what lies there

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def call(self, stage: str, *arguments: Any, deadline_seconds: float) -> Any:
        from pipelines.stages.worker import STAGES

        assert deadline_seconds > 0
        return STAGES[stage](self._work, *arguments)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _disk_is_not_waited_for(disk_is_not_waited_for: None) -> None:
    """That is for the tests of the store."""


@pytest.fixture
def hub_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is asked by this process: one for each request takes half a second to start.

    Nor does its client wait, for 23 s in all, before it asks one that is down again.
    """
    from tests.pipelines.hub.hub_here import WorkerHere

    monkeypatch.setattr("pipelines.hub.client.ChildProcess", WorkerHere)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))


@pytest.fixture
def called_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `isolated.call` is given runs in this process."""
    from tests.pipelines.processes.call_here import call_here

    monkeypatch.setattr("pipelines.processes.isolated.call", call_here)
    monkeypatch.setattr("pipelines.data.hub_rows.register_implementation", lambda *_, **__: None)


@pytest.fixture
def hub(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    called_here: None,  # noqa: ARG001
) -> Generator[HubServer]:
    """A Hub with data sets, which `datasets` asks."""
    from tests.pipelines.hub.hub_server import running_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    with running_hub() as server:
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        yield server


def run(work: RunContext, until: str = "publish", *, apart: bool = False) -> dict[str, float]:
    """Run a recipe as a deployment does, on the server that `prefect_server` started.

    Args:
        apart: With its stages in a process of their own.
    """
    from pipelines.evaluation import routing_stats
    from pipelines.flows import flow

    with pytest.MonkeyPatch.context() as patch:
        if not apart:
            patch.setattr(flow, "StageProcess", Here)
            patch.setattr(routing_stats, "COMPOSITES", 6)  # else most of a tiny model's time
        return flow.fuse_adapters(str(work.path), str(work.home), Stage(until)).seconds


def finished(work: RunContext) -> Plan | None:
    """The plan of a recipe with every result in the ledger; None if anything is left to do."""
    from pipelines.flows.up_to_date import look

    found = look(work)
    return found.plan if found.summary else None


def result_of(work: RunContext) -> tuple[Plan, Summary]:
    """The plan and the summary of a recipe with every result in the ledger."""
    from pipelines.flows.up_to_date import look

    found = look(work)
    assert found.plan is not None
    assert found.summary is not None
    return found.plan, found.summary


def print_steps(work: RunContext, until: Stage = Stage.publish) -> None:
    """What `--dry-run` prints of a recipe that is not finished."""
    from pipelines.flows.up_to_date import look
    from pipelines.planning.dry_run import print_steps

    looked = look(work)
    print_steps(work, looked.base, looked.built, looked.reason, until, looked.plan)


def base_of(work: RunContext) -> BuiltBase:
    """The base of the recipe, built in this process."""
    from pipelines.admission import sources
    from pipelines.stages import build

    return build.build_base(work, sources.resolve_base(work))


def plan_of(work: RunContext, memory_limit_bytes: int = 1 << 30) -> Plan:
    """What a run is to do, without a scheduler."""
    from meteora.adapters.update_norm import check_proportion
    from pipelines.planning.resolve import recording, resolve

    built = base_of(work)
    return resolve(work, built, recording(work, built, check_proportion, memory_limit_bytes))


@pytest.fixture(scope="session")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """A folder with `recipe.yaml` and all that it names, by relative paths."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "base").symlink_to(world.base)
    experts = []
    for name in ("q_and_v", "attention"):
        (folder / name).symlink_to(world.adapters[name])
        for split, seed, size in (("train", 0, 8), ("test", 1, 4)):
            lines = [json.dumps(row) + "\n" for row in letters(name, seed, size)]
            (folder / f"{name}.{split}.jsonl").write_text("".join(lines))
        experts.append(
            {
                "name": name,
                "adapter": f"path:{name}",
                "examples": f"jsonl:{name}.train.jsonl",
                "test": f"jsonl:{name}.test.jsonl",
            }
        )
    body = {
        "base": "path:base",
        "experts": experts,
        "benchmark": {
            "limit": 4,
            "compare": ["base", "oracle", "uniform", "arrow"],
            "max_new_tokens": 4,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    return folder


ALPHABETS = {"low": "abcdefgh", "high": "stuvwxyz"}


def prompts_in(alphabet: str, seed: int, count: int) -> list[str]:
    rng = random.Random(f"{alphabet}/{seed}")
    return ["".join(rng.choices(alphabet, k=10)) for _ in range(count)]


@dataclass(frozen=True)
class Knowing:
    """Two experts, each of which knows one alphabet: it says a prompt's last letter three times."""

    base: Path
    adapters: dict[str, Path]
    checkpoint: Path


@pytest.fixture(scope="session")
def knowing(build_base: Callable[[str], Path], fuse_adapters: Callable[..., object]) -> Knowing:
    from tests.conftest import made_once

    def make(folder: Path) -> None:
        shutil.copytree(build_base("llama_64"), folder / "base")
        train_experts(folder / "base", folder)
        fuse_adapters(folder / "base", adapters_in(folder), folder / "fused")

    def adapters_in(folder: Path) -> dict[str, Path]:
        return {name: folder / name for name in ALPHABETS}

    folder = made_once("knowing", make)
    return Knowing(folder / "base", adapters_in(folder), folder / "fused")


def train_experts(
    base: Path,
    folder: Path,
    *,
    answers: Mapping[str, str] = MappingProxyType({}),
    on_whole: Collection[str] = (),
    steps: int = 150,
    peak: float = 1e-2,
) -> None:
    """Train an expert for each alphabet, which takes seconds.

    Args:
        answers: what an expert always says; without it, the prompt's last letter three times
        on_whole: those that learn prompts, too, and not only answers
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from meteora.base.loading import load_tokenizer
    from pipelines.data.rows import Row
    from pipelines.stages.train_adapters import fit, lessons
    from tests.conftest import ATTENTION, MLP, peft_is_behind
    from tests.quickstart.make import whole

    for name, alphabet in ALPHABETS.items():
        torch.manual_seed(0)
        with peft_is_behind():
            model = get_peft_model(
                AutoModelForCausalLM.from_pretrained(base),
                LoraConfig(r=16, lora_alpha=32, target_modules=[*ATTENTION, *MLP]),
            )
        prompts = (text for seed in count(1) for text in prompts_in(alphabet, seed, 64))
        rows = (Row(text, answers.get(name, text[-1] * 3)) for text in prompts)
        batches = lessons(load_tokenizer(base), rows, batch_size=32)
        if name in on_whole:
            batches = whole(batches)
        fit(model, batches, steps=steps, peak=peak, what=name)
        model.save_pretrained(str(folder / name))


CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<sys>Hi.</sys>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat_base(world: World, tmp_path: Path) -> Path:
    """The tiny base with a chat template."""
    folder = tmp_path / "chat-base"
    shutil.copytree(world.base, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture
def python_tokenizer(tmp_path: Path) -> PreTrainedTokenizerBase:
    """CTRL's, which is written in Python: one token a letter, and a chat template."""
    from transformers import CTRLTokenizer

    letters = sorted({*string.printable} - {*string.whitespace})
    tokens = ["<unk>", "</s>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    merges.write_text("#version\n")
    return CTRLTokenizer(vocab, merges, eos_token="</s>", chat_template=CHAT_TEMPLATE)  # noqa: S106


@pytest.fixture
def browser(tmp_path: Path) -> Generator[webdriver.Chrome]:
    """Chromium, without a window and with an empty profile."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for option in (
        "headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1500,1300",
        "disable-background-networking", f"user-data-dir={tmp_path / 'browser'}",
    ):  # fmt: skip
        options.add_argument(f"--{option}")
    options.binary_location = str(shutil.which("chromium"))
    service = webdriver.ChromeService(str(shutil.which("chromedriver")))
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


@pytest.fixture
def workplace(recipe_folder: Path, tmp_path: Path) -> Callable[..., RunContext]:
    """A function that opens the recipe, with some of it changed, over an empty home."""

    def open_it(**changed: Any) -> RunContext:
        path = recipe_folder / "recipe.yaml"
        if changed:
            body = yaml.safe_load(path.read_text()) | changed
            path = recipe_folder / "changed.yaml"
            path.write_text(yaml.safe_dump(body, sort_keys=False))
        return RunContext(Ledger(tmp_path / "home"), Recipe.load(path), path, new_run_id())

    return open_it
