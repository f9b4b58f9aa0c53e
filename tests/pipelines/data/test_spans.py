"""Examples whose parts belong to different experts: read, labelled, and fitted to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers.processors import TemplateProcessing

from meteora.fitting.sequences import UNLABELLED
from pipelines.data.conversations import Conversation, Turn
from pipelines.data.labels import Labeller
from pipelines.data.rows import ExamplesError, Row, refuse_overlap
from pipelines.data.spans import Part, SpannedRow, prompt_parts, read_spans
from tests.pipelines.conftest import letters, result_of, run
from tests.pipelines.data.test_conversations import CHATML

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from pipelines.workspace.context import RunContext

BODY: dict[str, Any] = {
    "prompt": [
        {"text": "When was it, "},
        {"text": "and what is 3 + 4?", "expert": "sums"},
        {"text": " In ISO.", "expert": "dates"},
    ],
    "response": [{"text": "2021-03-03", "expert": "dates"}, {"text": ", 7", "expert": "sums"}],
}
NAMES = ["dates", "sums"]


def written(folder: Path, *bodies: object) -> str:
    lines = [json.dumps(body) if not isinstance(body, str) else body for body in bodies]
    (folder / "mixed.jsonl").write_text("\n".join(lines))
    return "jsonl:mixed.jsonl"


def test_each_token_belongs_to_the_expert_that_its_part_names(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = read_spans(written(tmp_path, BODY), tmp_path, NAMES)
    (sequence,) = Labeller(tokenizer, NAMES).spans(rows)
    owned: dict[int, list[int]] = {UNLABELLED: [], 0: [], 1: []}
    for token, expert in zip(sequence.input_ids, sequence.experts, strict=True):
        owned[expert].append(token)
    texts = {e: str(tokenizer.decode(ids, skip_special_tokens=True)) for e, ids in owned.items()}
    assert texts == {
        UNLABELLED: "When was it, ",
        0: " In ISO.2021-03-03",
        1: "and what is 3 + 4?, 7",
    }
    assert sequence.experts[-1] == 1  # the end of the sequence is the last one's
    assert not sequence.answer_starts


def test_a_token_that_a_tokenizer_puts_in_front_belongs_to_nobody(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", opens)
    row = SpannedRow((Part("red?", "sums"),), (Part("7", "sums"),))
    ids, owners = row.encode(tokenizer)
    assert (ids[0], owners) == (1, [None, *["sums"] * (len(ids) - 1)])


def test_a_short_prompt_is_not_found_in_the_templates_own_words(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    body = BODY | {"prompt": [{"text": "kind", "expert": "sums"}]}
    (sequence,) = Labeller(tokenizer, NAMES).spans(
        read_spans(written(tmp_path, body), tmp_path, NAMES)
    )
    asked = tokenizer("<|system|>Be kind.<|end|><|user|>").input_ids
    first = sequence.experts.index(1)
    assert first == len(asked)
    assert tokenizer.decode(list(sequence.input_ids[first : first + 4])) == "kind"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prompt": "text"}, "not a row with spans"),
        ({"prompt": []}, "not a row with spans"),
        ({"prompt": [{"text": ""}]}, "not a row with spans"),
        ({"prompt": [{"expert": "sums"}]}, "not a row with spans"),
        ({"prompt": [{"text": "p", "expert": 1}]}, "not a row with spans"),
        ({"prompt": [{"text": "p "}]}, "white space"),
        ({"prompt": [{"text": "\ud800"}]}, "half of a surrogate pair"),
        ({"response": [{"text": "r"}]}, "no expert; give each part one"),
        ({"response": [{"text": "r", "expert": "odd"}]}, "odd is not an expert .* dates, sums"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ExamplesError, match=f"line 2: .*{said}"):
        read_spans(written(tmp_path, BODY, BODY | changed), tmp_path, NAMES)


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path, json.dumps(BODY).replace('{"text"', '{"text": "p", "text"', 1))
    with pytest.raises(ExamplesError, match="line 1: the key 'text' is given twice; take one out"):
        read_spans(source, tmp_path, NAMES)


TURNS: dict[str, Any] = {
    "turns": [
        {"expert": "dates", "prompt": "When was it?", "response": "2021-03-03"},
        {"expert": "sums", "prompt": "What is 3 + 4?", "response": "7"},
    ]
}


def test_each_token_of_a_turn_belongs_to_its_expert(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    rows = read_spans(written(tmp_path, BODY, TURNS), tmp_path, NAMES)
    assert rows[1].to_dict() == TURNS  # the file and the line are no part of what is fitted to
    _, sequence = Labeller(tokenizer, NAMES).spans(rows)
    turns = tuple(Turn(**turn) for turn in TURNS["turns"])
    (expected,) = Labeller(tokenizer, NAMES).spans([Conversation(turns)])
    assert sequence == expected
    assert prompt_parts(rows[1:]) == {
        turn["expert"]: [Row(turn["prompt"], "")] for turn in TURNS["turns"]
    }


def test_a_prompt_in_parts_is_compared_with_tests_as_a_whole_too(tmp_path: Path) -> None:
    parts = prompt_parts(read_spans(written(tmp_path, BODY), tmp_path, NAMES))
    whole = Row("When was it, and what is 3 + 4? In ISO.", "")
    assert parts == {"sums": [Row("and what is 3 + 4?", "")], "dates": [Row("In ISO.", ""), whole]}
    with pytest.raises(ExamplesError, match="is also an example of expert dates"):
        refuse_overlap(parts, {"test": [whole]})


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([], "not a row with spans"),
        ("text", "not a row with spans"),
        ([{"expert": "sums", "prompt": "p"}], "turn 1 has no response; each turn needs expert"),
        (
            [*TURNS["turns"], {"expert": "sums", "prompt": "p", "response": " "}],
            "turn 3 has no resp",
        ),
        ([{"prompt": "p", "response": "r"}], "turn 1 has no expert"),
        ([{"expert": "sums", "prompt": 3, "response": "r"}], "turn 1 has no prompt"),
        (
            [{"expert": "odd", "prompt": "p", "response": "r"}],
            "odd is not an expert .* dates, sums",
        ),
    ],
)
def test_a_bad_turn_is_named_by_its_line(tmp_path: Path, turns: object, said: str) -> None:
    with pytest.raises(ExamplesError, match=f"line 3: .*{said}"):
        read_spans(written(tmp_path, BODY, TURNS, {"turns": turns}), tmp_path, NAMES)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        pytest.param("{{ raise_exception('no') }}", "these messages: no; set", id="refuses"),
        pytest.param(None, "turns need a chat template", id="none"),
    ],
)
def test_turns_that_the_template_refuses_are_named_by_their_line(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    template: str | None,
    said: str,
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rows = read_spans(written(tmp_path, TURNS), tmp_path, NAMES)
    with pytest.raises(ExamplesError, match=f"mixed.jsonl, line 1: .*{said}"):
        Labeller(tokenizer, NAMES).spans(rows)


def test_a_source_without_spans_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match="come from `jsonl:<file>`"):
        read_spans("hf:some/thing", tmp_path, NAMES)
    with pytest.raises(ExamplesError, match="no rows in it"):
        read_spans(written(tmp_path, ""), tmp_path, NAMES)
    with pytest.raises(ExamplesError, match="line 1: not a row with spans"):
        read_spans(written(tmp_path, "[" * 100_000), tmp_path, NAMES)


@pytest.mark.usefixtures("prefect_server")
def test_gates_are_fitted_to_them_unless_a_test_is_among_them(
    workplace: Callable[..., RunContext], recipe_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    one, other = letters("q_and_v", 5, 1)[0], letters("attention", 5, 1)[0]
    body = {
        key: [{"text": one[key], "expert": "q_and_v"}, {"text": other[key], "expert": "attention"}]
        for key in ("prompt", "response")
    }
    benchmark = {"limit": 1, "compare": [], "max_new_tokens": 1}
    long = body | {"prompt": [{"text": "a" * 600, "expert": "q_and_v"}]}  # no room in the base
    gates = {"spans": written(recipe_folder, body, long, body)}
    work = workplace(gates=gates, benchmark=benchmark)
    run(work)
    planned, _ = result_of(work)
    built = work.ledger.built(planned.router.id)
    assert built is not None
    spans = Labeller(tokenizer, planned.fused.names).spans(planned.spans)
    assert len(spans) == 3
    plain = [
        sequence
        for e, name in enumerate(planned.fused.names)
        for sequence in Labeller(tokenizer).rows(planned.examples[name], e)
    ]
    counted = sum(e != UNLABELLED for one in (*plain, *spans[::2]) for e in one.experts)
    assert built["num_tokens"] == counted

    body["prompt"][0]["text"] = letters("q_and_v", 1, 1)[0]["prompt"]
    written(recipe_folder, body)
    with pytest.raises(ExamplesError, match="also an example of expert q_and_v"):
        run(workplace(gates=gates, benchmark=benchmark))
