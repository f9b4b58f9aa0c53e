"""After `import meteora` the auto classes of transformers take fused checkpoints as their own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import meteora
from meteora.checkpoint.manifest import CONFIG, CONFIG_TEXT
from meteora.model import registration
from meteora.model.auto_classes import MeteoraConfig, UnsupportedArgumentError
from tests.conftest import World

FIRST = "import meteora, sys; assert not {'torch', 'transformers'} & set(sys.modules)\n"
THEN = "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline\n"
USE = """
folder, base = sys.argv[1:]
AutoTokenizer.from_pretrained(folder, base_folder=base)
ask = pipeline("text-generation", model=folder, model_kwargs={"base_folder": base})
print(len(ask("words", max_new_tokens=3)[0]["generated_text"]) > 5)
"""


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    """The checkpoint as a run writes it, with its `config.json`."""
    shutil.copytree(world.checkpoint, tmp_path / "fused")
    (tmp_path / "fused" / CONFIG).write_text(CONFIG_TEXT)
    return tmp_path / "fused"


@pytest.mark.parametrize("code", [FIRST + THEN, THEN + "import meteora, sys\n"])
def test_a_pipeline_runs_whichever_is_imported_first(world: World, folder: Path, code: str) -> None:
    """In a process of its own, where nothing has been imported."""
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code + USE, str(folder), str(world.base)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.stdout == "True\n", said.stderr


def test_auto_model_is_the_model_that_load_gives(world: World, folder: Path) -> None:
    ids = torch.arange(3, 40)[None]
    model = AutoModelForCausalLM.from_pretrained(folder, base_folder=world.base)
    expected, _ = meteora.load(folder, base_folder=world.base)
    assert type(model) is type(world.load_base())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)
        with meteora.force_expert(model, "q_and_v"):
            assert not torch.equal(model(ids).logits, expected(ids).logits)
    assert isinstance(AutoConfig.from_pretrained(folder), MeteoraConfig)


def test_arguments_of_transformers_mean_what_they_mean_there(world: World, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        base_folder=world.base,
        dtype="bfloat16",
        attn_implementation="eager",
        device_map="auto",
        trust_remote_code=False,
        low_cpu_mem_usage=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    answer = model(torch.arange(3, 9)[None])
    assert len(answer.hidden_states) == model.config.num_hidden_layers + 1
    assert len(answer.attentions) == model.config.num_hidden_layers
    tokenizer = AutoTokenizer.from_pretrained(folder, base_folder=world.base, padding_side="right")
    assert tokenizer is not None
    assert tokenizer.padding_side == "right"
    with pytest.raises(UnsupportedArgumentError, match="tp_plan"):
        AutoModelForCausalLM.from_pretrained(folder, base_folder=world.base, tp_plan="auto")


def test_a_checkpoint_above_the_one_that_is_asked_for_is_not_taken_for_it(
    world: World, folder: Path
) -> None:
    shutil.copytree(folder, folder / "other")
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        with pytest.raises(UnsupportedArgumentError, match="a subfolder, such as 'other'"):
            auto.from_pretrained(folder, subfolder="other", base_folder=world.base)
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="", base_folder=world.base)
    assert tokenizer is not None


def test_weights_that_are_given_are_not_dropped(world: World, folder: Path) -> None:
    weights = world.load_base().state_dict()
    with pytest.raises(UnsupportedArgumentError, match="not loaded with state_dict"):
        AutoModelForCausalLM.from_pretrained(folder, base_folder=world.base, state_dict=weights)


def test_pipeline_takes_a_folder(world: World, folder: Path) -> None:
    ask = pipeline(
        "text-generation", model=str(folder), model_kwargs={"base_folder": str(world.base)}
    )
    (found,) = ask("words", max_new_tokens=3, do_sample=False, return_full_text=False)
    assert isinstance(found["generated_text"], str)


def test_installing_twice_changes_nothing() -> None:
    before = list(sys.meta_path)
    registration.install()
    assert sys.meta_path == before
