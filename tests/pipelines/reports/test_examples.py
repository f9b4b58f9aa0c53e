"""A report's examples ask what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from meteora.artifacts import RouterOptions
from meteora.model.fused import make_router
from meteora.routing.layer import routed_by
from pipelines.reports.examples import Example, trace_examples
from tests.pipelines.conftest import CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.conftest import World

ASKED = Example("sums", "1 + 1?", "2", templated=True, max_new_tokens=2)
TURN = "<user>1 + 1?</><assistant>"
TEXT = f"<sys>Hi.</sys>{TURN}"
UNDER = f"<system>Be brief.</>{TURN}"


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (ASKED, TEXT),
        (replace(ASKED, system_prompt="Be brief."), UNDER),
        (replace(ASKED, prompt=UNDER, system_prompt="Be brief.", is_whole=True), UNDER),
        (replace(ASKED, templated=False), "1 + 1?"),
        (replace(ASKED, templated=False, is_whole=True), "1 + 1?"),
    ],
)
def test_a_prompt_is_traced_as_it_was_asked(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    example: Example,
    text: str,
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)
    model = world.load()
    with routed_by(model, lambda layer: make_router(RouterOptions("norm", 2, 0.5), layer)):
        (drawn,) = trace_examples(model, tokenizer, [example])
    assert "".join(drawn["data"]["pieces"][: len(drawn["asked"])]) == text
