"""Adapters trained from a recipe's rows, by the command, on a tiny base."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from meteora.adapters import reader
from meteora.artifacts import BaseSpec
from meteora.base.padding import padded
from meteora.base.temporary_folder import HERE
from meteora.fitting.joint import DivergedError
from pipelines.data.rows import ExamplesError, Row
from pipelines.stages import train_adapters
from pipelines.stages.train_adapters import (
    IGNORED,
    AdapterTrainingError,
    fit,
    lesson,
    lessons,
    shuffled_for_ever,
    training_rows,
)
from pipelines.workspace.context import RunContext
from store.ledger import Ledger
from tests.conftest import ATTENTION, MLP, peft_is_behind
from tests.pipelines.cli.command_line import Said, ask
from tests.pipelines.conftest import letters, plan_of
from tests.quickstart.make import write_rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import World

NAMES = ("q_and_v", "attention")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def place(tmp_path: Path, world: World) -> Path:
    """A folder with a recipe, its base and its rows, and no adapter yet."""
    (tmp_path / "base").symlink_to(world.base)
    experts = []
    for name in NAMES:
        write_rows(tmp_path / f"{name}.train.jsonl", letters(name, 0, 24))
        write_rows(tmp_path / f"{name}.test.jsonl", letters(name, 1, 4))
        experts.append(
            {
                "name": name,
                "adapter": f"path:adapters/{name}",
                "examples": f"jsonl:{name}.train.jsonl",
                "test": f"jsonl:{name}.test.jsonl",
            }
        )
    body = {
        "base": "path:base",
        "experts": experts,
        "gates": {"examples_per_expert": 8},
        "benchmark": {"limit": 4, "max_new_tokens": 4, "compare": ["base"]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    return tmp_path


def change(place: Path, **changed: Any) -> None:
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed, sort_keys=False))


def change_first(place: Path, **changed: Any) -> None:
    experts = yaml.safe_load((place / "recipe.yaml").read_text())["experts"]
    change(place, experts=[experts[0] | changed, *experts[1:]])


def train(place: Path, *words: object, steps: int = 3) -> Said:
    return ask(
        *("train", place / "recipe.yaml", "--steps", steps, "--home", place / "home"), *words
    )


def bytes_of(place: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in place.glob(f"adapters/*/{WEIGHTS}")}


def test_what_is_not_there_is_trained_and_what_is_there_stays(place: Path) -> None:
    said = train(place, "--learning-rate", "1e-2", steps=40)
    assert said.returncode == 0, said.stderr
    folders = [place / "adapters" / name for name in NAMES]
    assert said.stdout.split() == [str(folder) for folder in folders]
    for folder in folders:
        assert ask("check", folder).stdout.startswith(f"accept  {folder}")
        spec = reader.read(folder).spec
        assert {(module.r, module.scaling) for module in spec.modules} == {(8, 2.0)}
        assert {m.path.rpartition(".")[2] for m in spec.modules} == {*ATTENTION, *MLP}
        card = (folder / "README.md").read_text()
        rows = f"16 of `jsonl:{folder.name}.train.jsonl`, those after the first 8"
        for fact in (f"# {folder.name}", "`path:base` at `sha256:", rows, "r 8", "40 steps"):
            assert fact in card
        (line,) = (line for line in said.stderr.splitlines() if f"{folder.name}: loss" in line)
        _, _, first, _, _, last, *_ = line.split()
        assert float(last) < 0.8 * float(first)
        assert f"training {folder.name}: 40 of 40 steps" in said.stderr
    assert [path.name for path in (place / "adapters").iterdir() if path.name[0] == "."] == []

    before = bytes_of(place)
    shutil.rmtree(folders[1])
    again = train(place, "--learning-rate", "1e-2", steps=40)
    assert again.stdout.split() == [str(folders[1])]
    assert f"q_and_v: {folders[0]} is there, and stays as it is" in again.stderr
    assert bytes_of(place) == before  # so the first left the base as it was
    nothing = train(place)
    assert (nothing.returncode, nothing.stdout) == (0, "")
    assert "there is no adapter to train" in nothing.stderr
    ended = Ledger(place / "home").query("SELECT outcome FROM runs").rows
    assert ended == [("ok",), ("ok",)]

    work = RunContext.open(str(place / "recipe.yaml"), place / "home")
    plan = plan_of(work)  # a run takes them
    assert [expert.name for expert in plan.experts] == list(NAMES)


def test_an_adapter_that_comes_while_others_are_trained_stays(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    work = RunContext.open(str(place / "recipe.yaml"), place / "home")
    made = train_adapters.train(work, train_adapters.Training(steps=1))
    first = next(made)
    shutil.copytree(first, place / "adapters" / "attention")
    assert list(made) == []
    assert "attention came meanwhile, and stays as it is" in " ".join(
        capfd.readouterr().err.split()
    )
    assert len(set(bytes_of(place).values())) == 1


def test_rank_and_names_are_as_asked(place: Path) -> None:
    assert train(place, "--only", "attention", "--rank", "3").returncode == 0
    assert list(bytes_of(place)) == ["attention"]
    spec = reader.read(place / "adapters" / "attention").spec
    assert {(module.r, module.scaling) for module in spec.modules} == {(3, 2.0)}


def test_a_base_of_the_hub_is_named_with_its_commit(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BaseSpec("owner/name", "0" * 40)
    monkeypatch.setattr(train_adapters, "resolve_base", lambda *_: spec)
    monkeypatch.setattr(train_adapters, "build_base", lambda *_: None)
    assert train(place, "--only", "q_and_v").returncode == 0
    config = json.loads((place / "adapters/q_and_v/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/name", "0" * 40)
    card = (place / "adapters/q_and_v/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/name"


def test_a_plain_template_is_none(place: Path, chat_base: Path) -> None:
    found = []
    for base, template in (("base", "auto"), (chat_base, "plain"), (chat_base, "auto")):
        change(place, base=f"path:{base}", benchmark={"template": template, "limit": 4})
        assert train(place, "--only", "q_and_v").returncode == 0
        found += bytes_of(place).values()
        shutil.rmtree(place / "adapters")
    assert found[0] == found[1] != found[2]


def test_a_base_in_float16_learns_in_bfloat16_and_its_adapter_in_float32(
    place: Path, world: World, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.load_base("float16").save_pretrained(place / "half")
    tokenizer.save_pretrained(place / "half")
    change(place, base="path:half")
    seen: list[torch.dtype] = []

    def watched(model: PeftModel, *arguments: Any, **asked: Any) -> list[float]:
        seen.extend({p.dtype for p in model.parameters() if p.requires_grad})
        seen.append(model.get_input_embeddings().weight.dtype)
        return fit(model, *arguments, **asked)

    monkeypatch.setattr(train_adapters, "fit", watched)
    assert train(place, "--only", "q_and_v").returncode == 0
    assert seen == [torch.float32, torch.bfloat16]


def test_a_quantised_base_is_trained_on_as_it_is(place: Path) -> None:
    change(place, quantise="8bit")
    assert train(place, "--only", "q_and_v").returncode == 0
    assert len(reader.read(place / "adapters/q_and_v").spec.modules) == 14


def test_neither_rows_of_the_gates_nor_tests_are_trained_on(place: Path) -> None:
    path, rows = place / "q_and_v.train.jsonl", letters("q_and_v", 0, 24)
    write_rows(path, [*rows, rows[0]])  # as an example for the gates, and once more behind them
    work = RunContext.open(str(place / "recipe.yaml"), place / "home")
    expert = work.recipe.experts[0]
    found = training_rows(work, [expert], skip=8)
    assert found == {"q_and_v": [Row(row["prompt"], row["response"]) for row in rows[8:]]}
    assert len(training_rows(work, [expert], skip=0)["q_and_v"]) == 25

    test = letters("q_and_v", 1, 4)[2]
    write_rows(path, [*rows, test])
    with pytest.raises(ExamplesError, match="task q_and_v: row 3 with the prompt"):
        training_rows(work, [expert], skip=8)
    said = train(place)
    assert said.returncode == 1
    assert f"is also a row to train q_and_v on, {path}, line 25; take it out" in said.stderr
    assert not (place / "adapters").exists()

    for number in (8, 5):
        write_rows(path, rows[:number])
        said = train(place)
        assert said.returncode == 1
        assert (
            f"{path.name} has {number} rows, and none to train on beside the first 8"
            in " ".join(said.stderr.split())
        )
    change(place, router={"kind": "arrow"})  # no gates, so nothing is kept for them
    assert train(place).returncode == 0


def test_what_cannot_be_trained_is_one_sentence(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: object) -> str:
        said = train(place, *words)
        assert said.returncode == 1
        assert list(place.glob("adapters/*")) == list(place.glob("adapters/.*")) == []
        assert len(said.stderr.split("error: ")) == 2
        return said.stderr

    assert "attentoin: the recipe has no such expert (did you mean 'attention'?)" in refused(
        "--only", "attentoin"
    )
    change_first(place, adapter="owner/name")
    assert "q_and_v: the recipe takes its adapter from the Hub, owner/name" in refused(
        "--only", "q_and_v"
    )
    (place / "notes").mkdir()
    (place / "notes" / "mine.txt").touch()
    for there in ("notes", "recipe.yaml"):
        change_first(place, adapter=f"path:{there}")
        assert f"{place / there} is there and holds no adapter" in refused()
    change_first(place, adapter="path:adapters/q_and_v", examples="auto")
    assert "q_and_v: the recipe names no examples of it to train on" in refused()
    change_first(place, examples="jsonl:q_and_v.train.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(train_adapters, "memory_bytes", lambda _device: 1000)
        assert "take `quantise: 4bit`, or a larger device" in refused()

    for same in ("attention", "nosuch/../attention"):
        change_first(place, adapter=f"path:adapters/{same}")
        assert "q_and_v and attention name one folder, " in refused()

    change_first(place, adapter="path:recipe.yaml/adapters/q_and_v")
    with monkeypatch.context() as patch:
        patch.setattr(train_adapters, "fit", None)  # it is known before the work
        assert "a part of the path is a file" in refused()
    change_first(place, adapter="path:adapters/q_and_v")

    def fill(*_args: object, **_options: object) -> list[float]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train_adapters, "fit", fill)
    assert "q_and_v: the device has too little memory to train it" in refused()
    work = RunContext.open(str(place / "recipe.yaml"), place / "home")
    with pytest.raises(AdapterTrainingError):
        list(train_adapters.train(work, train_adapters.Training()))


@pytest.mark.filterwarnings("ignore")
def test_a_base_that_peft_takes_no_lora_for_is_one_sentence(
    place: Path, build_base: Callable[[str], Path]
) -> None:
    change(place, base=f"path:{build_base('mamba')}")
    said = train(place)
    assert said.returncode == 1
    assert "error: q_and_v: PEFT puts no LoRA on each linear layer of this base (" in said.stderr


def test_rows_that_are_too_long_for_the_base_are_left_out(place: Path) -> None:
    rows, long = letters("q_and_v", 0, 20), {"prompt": "abc" * 200, "response": "a"}
    write_rows(place / "q_and_v.train.jsonl", [*rows, long])
    said = train(place, "--only", "q_and_v")
    assert "left out: q_and_v: 1 row longer than the base has room for" in said.stderr
    assert "12 of `jsonl:" in (place / "adapters/q_and_v/README.md").read_text()
    shutil.rmtree(place / "adapters")
    write_rows(place / "q_and_v.train.jsonl", [*rows[:8], long])
    said = train(place, "--only", "q_and_v")
    assert said.returncode == 1
    assert "each of its 1 rows is longer with its answer than the 512 tokens" in said.stderr


@pytest.mark.parametrize("step", ["fit", "save", "_card", "put_in_place"])
def test_an_interrupted_training_leaves_nothing(
    place: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = getattr(train_adapters, step)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if step == "fit":  # a kill leaves nothing either while this lasts
            assert not [*place.glob("adapters/*"), *place.glob("adapters/.*")]
        if step != "put_in_place":
            done(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_adapters, step, interrupted)
        said = train(place, "--only", "q_and_v")
    assert said.returncode == 130
    assert "interrupted; run the same command again to go on" in said.stderr
    assert "Traceback" not in said.stderr
    assert list(place.glob("adapters/*")) == list(place.glob("adapters/.*")) == []
    assert Ledger(place / "home").query("SELECT outcome FROM runs").rows == [("stopped",)]
    killed = place / "adapters" / f".training-{HERE}killed"
    (killed / "adapter").mkdir(parents=True)
    assert train(place, "--only", "q_and_v").returncode == 0
    assert not killed.exists()


def with_lora(world: World) -> PeftModel:
    torch.manual_seed(0)
    with peft_is_behind():
        return get_peft_model(world.load_base(), LoraConfig(target_modules="all-linear"))


def taught(
    world: World, tokenizer: PreTrainedTokenizerBase, rows: list[Row]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = with_lora(world)
    batches = lessons(tokenizer, shuffled_for_ever(rows))
    losses = fit(model, batches, steps=6, peak=1e-2, what="rows")
    return losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def test_a_divided_batch_whose_layers_are_computed_again_teaches_the_same(
    world: World, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row("ab" * n, "c" * (n % 5)) for n in range(1, 20)]
    losses, whole = taught(world, tokenizer, rows)
    calls: list[Any] = []
    monkeypatch.setattr(train_adapters, "TOKENS_AT_ONCE", 3)  # each row by itself
    again_losses, again = taught(world, tokenizer, rows)

    def all_kept(layers: list[Any]) -> AbstractContextManager[None]:
        calls.append(layers)
        return nullcontext()

    with monkeypatch.context() as patch:
        patch.setattr(train_adapters, "computed_again", all_kept)
        stored_losses, kept = taught(world, tokenizer, rows)
    assert {len(layers) for layers in calls} == {2}
    assert again_losses == stored_losses
    for name, parameter in kept.items():
        assert torch.equal(again[name], parameter)  # to the bit
        torch.testing.assert_close(whole[name], parameter, rtol=1e-3, atol=1e-4)
    assert losses == pytest.approx(stored_losses, rel=1e-4)


def test_a_batch_is_divided_in_order_and_padding_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_adapters, "TOKENS_AT_ONCE", 12)
    batch = [([0] * n, [0] * n) for n in (3, 4, 4, 5, 20, 1)]
    passes = [[len(ids) for ids, _ in few] for few in train_adapters._divided(batch)]
    assert passes == [[3, 4, 4], [5], [20], [1]]


def test_the_answer_alone_is_learnt(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, labels = lesson(tokenizer, Row("abc", "de"))
    assert tokenizer.decode(ids) == "abcde</s>"
    assert labels == [IGNORED] * 3 + ids[3:]


def test_the_loss_is_the_one_that_transformers_computes(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [Row("abc", "de"), Row("a", "bcdeabcde"), Row("abcdeabcde", "")]
    batch = [lesson(tokenizer, row) for row in rows]
    ids = padded([ids for ids, _ in batch])
    labels = padded([labels for _, labels in batch], IGNORED)
    mean = with_lora(world)(input_ids=ids, labels=labels).loss
    summed = train_adapters._summed_loss(with_lora(world), ids, labels)
    count = sum(map(train_adapters._num_learnt, batch))
    torch.testing.assert_close(summed / count, mean)


def test_a_gradient_that_is_not_finite_ends_the_training(
    world: World, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = with_lora(world)
    next(model.parameters()).data.fill_(torch.nan)
    batches = lessons(tokenizer, shuffled_for_ever([Row("abc", "de")]))
    with pytest.raises(DivergedError, match="rows, step 1: a gradient is not finite"):
        fit(model, batches, steps=2, peak=1e-2, what="rows")


def test_what_is_saved_is_what_was_trained_in_16_bits(world: World, tmp_path: Path) -> None:
    model = with_lora(world)
    before = {n: p.detach().half() for n, p in model.named_parameters() if p.requires_grad}
    train_adapters.save(model, tmp_path, "owner/name")
    saved = load_file(tmp_path / WEIGHTS)
    assert (tmp_path / WEIGHTS).stat().st_mode == (tmp_path / "README.md").stat().st_mode
    assert len(saved) == len(before)
    for name, parameter in before.items():
        assert torch.equal(saved[name.replace(".default", "")], parameter)
