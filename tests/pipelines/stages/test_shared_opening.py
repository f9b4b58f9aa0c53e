"""Recipes whose gates are fitted to conversations, from YAML to a checkpoint that grows.

The tokens that say nothing have all experts together, or a question decides for its whole turn.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

import meteora
from meteora.artifacts import NULL, SHARED
from meteora.checkpoint.manifest import CARD, read_manifest
from meteora.routing.layer import routed_layers
from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import finished, result_of, run
from tests.pipelines.stages.conftest import dropped_and_added
from tests.pipelines.stages.test_without_examples import experts

pytestmark = pytest.mark.usefixtures("prefect_server")

QUICK = {"limit": 1, "compare": ["uniform", "arrow"], "max_new_tokens": 1}


@pytest.mark.parametrize(
    ("router", "more"), [({}, [SHARED]), ({"share": "turn"}, [])], ids=["shared", "turn"]
)
def test_a_run_fits_conversations_and_system_prompts_and_the_checkpoint_can_grow(
    router: dict[str, str],
    more: list[str],
    workplace: Callable[..., RunContext],
    chat_base: Path,
    recipe_folder: Path,
) -> None:
    work = workplace(base=f"path:{chat_base}", router=router, benchmark=QUICK)
    run(work)
    planned, _ = result_of(work)
    folder = work.checkpoint_folder(planned.router.id)
    manifest = read_manifest(folder)
    assert manifest.choices == ["q_and_v", "attention", *more]
    assert manifest.gates["conversations"] == [1, 2, 3, 4]
    assert "" in manifest.gates["system_prompts"]

    model, tokenizer = meteora.load(folder, base_folder=chat_base)
    found = meteora.trace(model, tokenizer, "abcdabcd")
    assert list(found.experts) == manifest.choices
    if router:  # the prompt and its answer have one expert in each module
        assert (found.chosen == found.chosen[:, :1]).all()
    assert meteora.generate(model, tokenizer, "abcdabcd", max_new_tokens=3)

    grown = dropped_and_added(folder, chat_base, recipe_folder, work.home)
    again, _ = meteora.load(grown, base_folder=chat_base)
    assert meteora.expert_names(again) == manifest.choices
    assert {layer.num_choices for layer in routed_layers(again).values()} == {2 + len(more)}


@pytest.mark.parametrize(
    "router",
    [
        pytest.param({"null": True}, id="with the base as a choice"),
        pytest.param({"without_examples": "arrow"}, id="with an expert without examples"),
        pytest.param({"share": "turn", "null": True}, id="a turn, with the base"),
        pytest.param({"share": "turn", "without_examples": "norm"}, id="a turn, without examples"),
    ],
)
def test_it_goes_with_the_other_options_of_gates(
    workplace: Callable[..., RunContext],
    chat_base: Path,
    recipe_folder: Path,
    router: dict[str, object],
) -> None:
    more = {} if "null" in router else {"experts": experts(recipe_folder)}
    (recipe_folder / "strange.jsonl").write_text('{"prompt": "0 9 1", "response": "2"}\n')
    asked = {"base": f"path:{chat_base}", "router": router}
    strange = [{"name": "strange", "rows": "jsonl:strange.jsonl"}]
    work = workplace(benchmark=QUICK | {"tasks": strange}, **asked, **more)
    run(work)
    planned, summary = result_of(work)
    routing = summary.routing
    assert routing is not None
    folder = work.checkpoint_folder(planned.router.id)
    assert ("with an AUROC of" in (folder / CARD).read_text()) == ("null" in router)
    if "null" in router:
        assert routing.abstention is not None
        assert (routing.abstention.num_own, routing.abstention.num_nobodys) == (2, 1)
    last = [*([] if "share" in router else [SHARED]), *([NULL] if "null" in router else [])]
    assert read_manifest(folder).choices == ["q_and_v", "attention", *last]
    model, tokenizer = meteora.load(folder, base_folder=chat_base)
    assert meteora.generate(model, tokenizer, "abcdabcd", max_new_tokens=3)


def test_two_examples_of_an_expert_are_enough_where_one_conversation_would_have_both(
    workplace: Callable[..., RunContext], chat_base: Path
) -> None:
    gates = {"examples_per_expert": 2, "conversations": [4]}
    work = workplace(base=f"path:{chat_base}", gates=gates, benchmark=QUICK)
    run(work)
    assert finished(work) is not None


def test_the_first_token_is_nobodys_where_nothing_opens_a_prompt(
    workplace: Callable[..., RunContext],
) -> None:
    work = workplace(benchmark=QUICK)
    run(work)
    planned, _ = result_of(work)
    manifest = read_manifest(work.checkpoint_folder(planned.router.id))
    assert manifest.choices == ["q_and_v", "attention", SHARED]
