"""Examples from the data set that an adapter's card names."""

import json
from collections.abc import Callable
from functools import partial
from gzip import compress
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from pyarrow import Table
from pyarrow.parquet import write_table

from pipelines.admission.card_examples import (
    NoCardExamplesError,
    columns_of,
    licences_of_data_sets,
    read_card_examples,
)
from pipelines.data import pinned
from pipelines.data.claims import Claim
from pipelines.data.row_sources import no_token, read_rows
from pipelines.data.rows import ExamplesError, Row
from pipelines.hub.card import datasets_of
from pipelines.planning.plan import Plan, make_plan
from pipelines.processes import isolated
from pipelines.workspace.context import RunContext
from tests.pipelines.conftest import letters, plan_of
from tests.pipelines.hub.hub_server import Fault, HubServer, Main, running_hub

CALL = isolated.call


def turns(*said: tuple[str, str], role: str = "role", content: str = "content") -> list[Any]:
    return [{role: who, content: text} for who, text in said]


def put(hub: HubServer, name: str, rows: list[dict[str, Any]], file: str = "train.jsonl") -> None:
    hub.repos[name] = Main({file: jsonl(rows)})


def said(*texts: str, system: str = "") -> list[Any]:
    """A conversation: question, answer, question, …"""
    opening = [("system", system)] if system else []
    return turns(*opening, *zip(("user", "assistant") * len(texts), texts, strict=False))


@pytest.mark.parametrize(
    ("item", "columns"),
    [
        ({"id": 1, "question": "a", "answer": "b"}, ("question", "answer")),
        ({"instruction": "a", "input": "", "output": "b"}, ("instruction,input", "output")),
        ({"instruction": "a", "output": "b"}, ("instruction", "output")),
        ({"input": "a", "output": "b", "prompt": "c", "completion": "d"}, ("prompt", "completion")),
        ({"question": "a", "context": "b", "answer": "c"}, ("question,context", "answer")),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ("prompt", "chosen")),
        ({"Question": "a", "Answer": "b"}, ("Question", "Answer")),
        ({"Question": "a", "question": "b", "answer": "c"}, None),
        ({"messages": said("a", "b")}, "messages"),
        ({"messages": said("a", "b", "c", "d", system="s")}, "messages"),
        ({"text": "a", "messages": turns(("assistant", "a"), ("user", "b"))}, None),
        ({"Conversations": turns(("human", "a"), ("gpt", "b"), role="from", content="value")},
         "Conversations"),
        ({"prompt": said("a"), "completion": turns(("assistant", "b"))}, "prompt,completion"),
        ({"prompt": said("a"), "chosen": turns(("assistant", "b"))}, "prompt,chosen"),
        ({"prompt": "a", "chosen": said("a", "b"), "rejected": said("a", "c")}, "prompt,chosen"),
        ({"chosen": said("a", "b"), "rejected": said("a", "c")}, "chosen"),
        ({"prompt": "a", "completion": turns(("assistant", "b"))}, None),
        ({"chosen": "a", "rejected": "b"}, None),
        ({"text": "a"}, None),
        ({"question": "a", "answer": 3}, None),
        ({"question": "a", "answer": None}, None),
        ({"messages": "a"}, None),
        ({"messages": ["a", "b"]}, None),
        ({"messages": turns(("user", "a"))}, None),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}, *said("", "b")[1:]]}, None),
        ({"messages": [{"role": ["user"], "content": "a"}, 3, {}]}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_columns_are_taken_where_their_names_leave_no_doubt(
    item: dict[str, Any], columns: tuple[str, str] | str | None
) -> None:
    expected = {"turns": columns} if isinstance(columns, str) else columns
    if isinstance(columns, tuple):
        expected = dict(zip(("prompt", "response"), columns, strict=True))
    assert columns_of([item]) == expected


def test_columns_are_chosen_by_more_rows_than_the_first() -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "a", "input": None, "output": None},
        {"instruction": "b", "input": "c", "output": "d"},
    ]
    assert columns_of(rows) == {"prompt": "instruction,input", "response": "output"}
    assert columns_of([*rows, {"instruction": "a", "input": "b", "output": 3}]) is None


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = BytesIO()
    write_table(Table.from_pylist(rows), file)
    return file.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def configs(*lines: str) -> bytes:
    return "\n".join(("---", "configs:", *lines, "---")).encode()


MAIN = ("- config_name: main", "  data_files: main.jsonl")
OTHER = ("- config_name: other", "  data_files: other.jsonl")
QUESTIONS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
SHAPES: dict[str, dict[str, bytes]] = {
    "parquet with a test split": {
        "data/test-00000-of-00001.parquet": parquet([{"question": "t", "answer": "t"}]),
        "data/train-00000-of-00001.parquet": parquet(QUESTIONS),
    },
    "splits of several kinds": {
        f"data/{split}-00000-of-00001.parquet": parquet([{"messages": said(*row)} for row in rows])
        for split, rows in (
            ("test_sft", [("t", "t")]),
            ("train_sft", [row.values() for row in QUESTIONS]),
        )
    },
    "an array of JSON, with and without an input": {
        "data.json": json.dumps(
            [{"instruction": f"q{i}", "input": ["", None][i % 2], "output": f"a{i}"}
             for i in range(3)]
        ).encode()
    },
    "a default config": {
        "README.md": configs(*OTHER, *MAIN, "  default: true"),
        "main.jsonl": jsonl(QUESTIONS),
        "other.jsonl": jsonl([{"question": "o", "answer": "o"}]),
    },
    "a system prompt in some rows": {
        "train.jsonl": jsonl(
            [{"messages": said(f"q{i}", f"a{i}", "m", system="s" * (i % 2))} for i in range(3)]
        )
    },
    "prompts and completions of turns": {
        "train.jsonl": jsonl(
            [{"prompt": said(f"q{i}", system="s"), "completion": turns(("assistant", f"a{i}"))}
             for i in range(3)]
        )
    },
    "preferences": {
        "train.jsonl": jsonl(
            [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": "r"} for i in range(3)]
        )
    },
    "capitals": {"train.csv": b"Question,Answer\nq0,a0\nq1,a1\nq2,a2\n"},
    "choices, the answer among them": {
        "train.jsonl": jsonl([row | {"choices": [row["answer"], "x"]} for row in QUESTIONS])
    },
    "rows without an answer, or a question": {
        "train.jsonl": jsonl(
            [QUESTIONS[0], {"question": "q", "answer": None}, {"question": None, "answer": "a"},
             QUESTIONS[1], {"question": " ", "answer": "a"}, {"question": "q", "answer": ""},
             QUESTIONS[2]]
        )
    },
}  # fmt: skip
"""Data sets of three questions, as they lie on the Hub."""


@pytest.mark.parametrize("shape", SHAPES)
def test_usual_shapes_of_data_sets_are_read(hub: HubServer, tmp_path: Path, shape: str) -> None:
    hub.repos["a/b"] = Main(SHAPES[shape])
    rows, _ = read_card_examples(["a/b"], tmp_path, 9, no_token)
    assert [(row.prompt, row.response) for row in rows] == [(f"q{i}", f"a{i}") for i in range(3)]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (
            {
                "README.md": configs(*OTHER, *MAIN),
                "main.jsonl": jsonl(QUESTIONS),
                "other.jsonl": jsonl(QUESTIONS),
            },
            "a/b has several configs (other, main), and none is its default",
        ),
        (
            {"b.py": b"raise SystemExit", "train.jsonl": jsonl(QUESTIONS)},
            "a/b cannot be read (Dataset scripts are no longer supported, but found b.py)",
        ),
        (
            {"train.jsonl": jsonl([{"text": "### Question: q ### Answer: a"}])},
            "a/b has the columns text, which are none of a prompt and its answer as text",
        ),
        (
            {"train.jsonl": jsonl([{"question": "q", "choices": ["a", "b"], "answer": 1}])},
            "a/b has the columns question, choices, answer, which are none of a prompt and its"
            " answer as text",
        ),
        (
            {"train.jsonl": jsonl([{"question": "q", "choices": ["a", "b"], "answer": "B"}])},
            "hf:a/b, row 0: the answer 'B' is not one of its choices; name the column of the"
            " answer's text, or leave the choices out by `choices=`",
        ),
        (
            {"train.jsonl": jsonl([{"question": "q", "answer": None}])},
            "a/b has the columns question, answer, which are none of a prompt and its answer as"
            " text",
        ),
        ({"README.md": b"---\nlicense: mit\n---\n"}, "a/b cannot be read (The directory at"),
    ],
    ids=["configs", "script", "text", "index", "letter", "no answers", "no files"],
)
def test_an_unclear_data_set_is_a_reason_of_one_sentence(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], reason: str
) -> None:
    hub.repos["a/b"] = Main(files)
    with pytest.raises(NoCardExamplesError) as refused:
        read_card_examples(["a/b"], tmp_path, 9, no_token)
    assert str(refused.value).startswith(reason)
    assert "gated" not in str(refused.value)


def test_rows_are_those_of_the_first_data_set_that_can_be_read(
    hub: HubServer, tmp_path: Path
) -> None:
    put(hub, "somebody/pictures", [{"image": 1, "\x1b[2J": 2}])
    chats = [turns(("user", f"q{i}"), ("assistant", "a")) for i in range(8)]
    endless = turns(("user", "q" * 8_001), ("assistant", "a"))
    put(hub, "somebody/chats", [{"messages": said} for said in (chats[0], endless, *chats[1:])])
    names = ["somebody/none", "somebody/pictures", "somebody/chats"]
    rows, source = read_card_examples(names, tmp_path, 4, no_token)
    assert rows == [Row(f"q{i}", "a") for i in range(4)]
    commit = hub.repos["somebody/chats"].commit
    assert source == (
        "hf:somebody/chats?config=default&split=train&longest=8000&incomplete=skip"
        f"&revision={commit}&turns=messages"
    )
    hub.requests.clear()
    assert read_rows(source, tmp_path, 4) == rows
    assert not hub.requests  # they are here, and a commit does not move
    assert read_card_examples(names[2:], tmp_path, 4, no_token) == (rows, source)
    assert hub.count("revision") == len(hub.requests) == 1
    with pytest.raises(
        NoCardExamplesError,
        match=r"none cannot be read \(.*\); somebody/pictures has the columns image, �\[2J, which",
    ):
        read_card_examples(names[:2], tmp_path, 4, no_token)
    with pytest.raises(NoCardExamplesError, match="its card names no data set"):
        read_card_examples([], tmp_path, 4, no_token)


def test_a_folder_of_the_name_is_not_read_in_place_of_a_strangers_data_set(
    hub: HubServer, tmp_path: Path
) -> None:
    rows = [{"question": "q", "answer": "a"}]
    put(hub, "tasks/sums", rows)
    (tmp_path / "tasks" / "sums").mkdir(parents=True)
    (tmp_path / "tasks" / "sums" / "train.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(NoCardExamplesError, match="tasks/sums is also a folder in the working"):
        read_card_examples(["tasks/sums"], tmp_path, 4, no_token)
    assert not hub.requests


@pytest.mark.parametrize(
    ("file", "data", "said"),
    [
        (
            "train.jsonl",
            b'{"question": "q", "answer": "a", "choices": 3}\n',
            r"'choices' \(choices= leaves it out\): a list of texts is needed",
        ),
        ("train.jsonl", b'{"question": "q"}\n{"question', r"^a/b cannot be read \(JSON [^;]*$"),
        ("train.csv", b"question,answer\n", "a/b has no rows"),
        ("train.zip", b"PK\x03\x04", "a/b cannot be read"),
        ("train.jsonl.gz", b"\x1f\x8b\x08", "a/b cannot be read"),
        ("train.parquet", b"PAR1", "a/b cannot be read"),
        ("notes.txt", b"", "a/b"),
    ],
    ids=["choices", "JSON", "header", "zip", "gzip", "parquet", "empty"],
)
def test_a_damaged_data_set_is_a_reason_and_no_crash(
    hub: HubServer, tmp_path: Path, file: str, data: bytes, said: str
) -> None:
    hub.repos["a/b"] = Main({file: data})
    with pytest.raises(NoCardExamplesError, match=said):
        read_card_examples(["a/b"], tmp_path, 4, no_token)


@pytest.mark.parametrize("status", [401, 403])
def test_a_data_set_that_asks_for_consent_is_told_with_what_to_do(
    hub: HubServer, tmp_path: Path, status: int
) -> None:
    put(hub, "a/b", [{"question": "q", "answer": "a"}])
    for kind in ("head", "get"):
        hub.faults[kind] = Fault(status, {"X-Error-Code": "GatedRepo"})
    what_to_do = r".*gated or private, accept its terms .* `hf auth login`, .*--token-for"
    with pytest.raises(NoCardExamplesError, match=f"^a/b cannot be read{what_to_do}"):
        read_card_examples(["a/b"], tmp_path, 4, no_token)
    with pytest.raises(ExamplesError, match=f"^hf:a/b cannot be read{what_to_do}"):
        read_rows("hf:a/b?split=train", tmp_path, 1)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("head", Fault(status=500)),
        ("tree", Fault(status=500)),
        ("get", Fault(status=500)),
        ("revision", Fault(200, {"Content-Length": "9", "Connection": "close"}, body=b"{")),
    ],
)
def test_a_fault_of_the_hub_is_no_verdict_on_a_data_set(
    hub: HubServer, tmp_path: Path, kind: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    put(hub, "a/b", [{"question": "q", "answer": "a"}])
    hub.faults[kind] = fault
    with pytest.raises(ExamplesError, match="a/b") as caught:
        read_card_examples(["a/b"], tmp_path, 4, no_token)
    assert not isinstance(caught.value, NoCardExamplesError)


def apart(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on data sets of this Hub are read in a process of its own."""
    monkeypatch.setattr(isolated, "call", CALL)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))


def test_a_hub_that_hangs_is_given_up(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart(hub, tmp_path, monkeypatch)
    put(hub, "a/b", [{"question": "q", "answer": "a"}])
    hub.faults["revision"] = Fault(hang=True)
    monkeypatch.setattr(pinned, "SECONDS", 0.2)
    with pytest.raises(ExamplesError, match=r"hf:a/b cannot be read .*not done within 0\.2 s"):
        read_rows("hf:a/b?split=train", tmp_path, 1)
    hub.faults.clear()
    monkeypatch.setattr(pinned, "SECONDS", 60.0)
    monkeypatch.setattr(pinned, "READ_SECONDS", 0.0)
    with pytest.raises(ExamplesError, match=r"hf:a/b cannot be read .*not done within 0 s"):
        read_rows("hf:a/b?split=train", tmp_path, 1)
    with pytest.raises(ExamplesError, match="the Hub cannot be reached for a/b") as caught:
        read_card_examples(["a/b"], tmp_path, 1, no_token)
    assert not isinstance(caught.value, NoCardExamplesError)


def test_a_data_set_names_no_files_of_other_servers(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart(hub, tmp_path, monkeypatch)
    with running_hub() as inside:
        address = f"{inside.endpoint}/delete?id=1"
        hub.repos["a/b"] = Main(
            {
                "README.md": configs("- config_name: main", f"  data_files: {address}"),
                "train.jsonl": jsonl(QUESTIONS),
            }
        )
        with pytest.raises(NoCardExamplesError, match="files outside its repository"):
            read_card_examples(["a/b"], tmp_path, 4, no_token)
        assert not inside.requests
    hub.repos["a/c"] = Main({"train.jsonl.gz": compress(jsonl(QUESTIONS))})
    rows, _ = read_card_examples(["a/c"], tmp_path, 4, no_token)
    assert [row.prompt for row in rows] == ["q0", "q1", "q2"]


def test_a_hub_that_cannot_be_reached_is_no_missing_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ExamplesError, match="the Hub cannot be reached for somebody/c") as caught:
        read_card_examples(["somebody/chats"], tmp_path, 4, no_token)
    assert not isinstance(caught.value, NoCardExamplesError)


def test_a_card_names_data_sets_of_the_hub(tmp_path: Path) -> None:
    for lines, names in (
        ("datasets: [a/b, c/d, a/b]", ("a/b", "c/d")),
        ("datasets: a/b", ("a/b",)),
        ("datasets:\n- imdb\n- ../etc/passwd\n- a/b/c\n- {a: b}", ()),
        ("license: mit", ()),
        (
            "datasets: [" + ", ".join(f"a/b{i}" for i in range(99)) + "]",
            tuple(f"a/b{i}" for i in range(4)),
        ),
    ):
        (tmp_path / "README.md").write_text(f"---\n{lines}\n---\n")
        assert datasets_of(tmp_path) == names


def test_a_recipe_takes_the_examples_of_a_card(
    workplace: Callable[..., RunContext], hub: HubServer, tmp_path: Path
) -> None:
    plain = workplace()
    (tmp_path / "adapter").mkdir()
    for file in (plain.folder / "attention").iterdir():
        if file.name != "README.md":
            (tmp_path / "adapter" / file.name).symlink_to(file.resolve())
    experts = [section.model_dump(exclude_none=True) for section in plain.recipe.experts]
    experts[1] |= {"adapter": f"path:{tmp_path / 'adapter'}", "examples": "auto"}

    asked = {"experts": experts}
    with pytest.raises(
        NoCardExamplesError, match="expert attention: no examples: its card names no"
    ):  # and in plain text the expert can write none itself
        plan_of(workplace(**asked, benchmark={"template": "plain"}))
    by_weights = {"benchmark": {"template": "plain"}, "router": {"without_examples": "arrow"}}
    assert plan_of(workplace(**asked, **by_weights)).router.stand_ins == ("attention",)
    work = workplace(**asked)
    plan = plan_of(work)
    assert plan.pool is not None
    assert plan.pool.writers == ("attention",)
    assert not plan.is_pool_divided
    wrote = ["one", f" {plan.own_tests['attention'][0].prompt}", "two"]  # a test row is no example
    claims = [Claim(text, "attention", 0, 1.0, 1.0, "said") for text in wrote]
    with patch("pipelines.planning.plan.recorded_claims", return_value=claims):
        dealt = make_plan(work, plan.base, plan.experts)
    assert [row.prompt for row in dealt.examples["attention"]] == ["one", "two"]
    (tmp_path / "adapter" / "README.md").write_text("---\ndatasets: [somebody/letters]\n---\n")
    rows = letters("attention", 0, 8)
    asked_rows = [{"question": r["prompt"], "answer": r["response"]} for r in rows]
    put(hub, "somebody/letters", asked_rows)
    hub.repos["somebody/letters"].card = {"license": "mit"}
    plan = plan_of(workplace(**asked))
    assert [row.prompt for row in plan.examples["attention"]] == [row["prompt"] for row in rows]
    assert plan.card_examples["attention"].startswith("hf:somebody/letters?")
    sources = [*plan.card_examples.values()]
    assert licences_of_data_sets(sources, lambda _: None) == {"somebody/letters": "mit"}
    labelled = plan_of(plain)
    assert plan.router.examples_sha256 == labelled.router.examples_sha256

    tested = [{"question": r.prompt, "answer": "?"} for r in plan.own_tests["attention"]]
    put(hub, "somebody/letters", [tested[0], *asked_rows[:3], *tested[1:], *asked_rows[3:]])
    hub.repos["somebody/letters"].commit = "b" * 40
    assert plan_of(workplace(**asked)).examples["attention"] == labelled.examples["attention"]
    put(hub, "somebody/letters", [*tested, asked_rows[0]])
    hub.repos["somebody/letters"].commit = "c" * 40
    plan = plan_of(workplace(**asked))
    assert plan.no_card_examples["attention"].endswith(": all but 1 of its 5 rows are test rows")


def test_rows_of_the_hub_are_those_of_one_commit_and_are_here_afterwards(
    workplace: Callable[..., RunContext], hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = letters("attention", 0, 8)
    put(hub, "somebody/letters", rows)
    commit = hub.repos["somebody/letters"].commit
    experts = [section.model_dump(exclude_none=True) for section in workplace().recipe.experts]

    def plan(revision: str) -> Plan:
        experts[1]["examples"] = f"hf:somebody/letters?split=train{revision}"
        return plan_of(workplace(experts=experts))

    first = plan("")
    assert first.hub_examples == {"attention": f"hf:somebody/letters?split=train&revision={commit}"}
    lines = "".join(json.dumps(row) + "\n" for row in rows[:5])
    hub.repos["somebody/letters"] = Main({"train.jsonl": lines.encode()}, commit="b" * 40)
    assert len(plan("").examples["attention"]) == 5
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert plan(f"&revision={commit}").router == first.router
    with pytest.raises(ExamplesError, match="hf:somebody/letters cannot be read from the Hub"):
        plan("")
    assert not hub.requests


@pytest.mark.parametrize("commit", ["", "main", "0" * 39, "../x", None])
def test_what_is_no_commit_is_not_taken_for_one(
    hub: HubServer, tmp_path: Path, commit: str | None
) -> None:
    put(hub, "a/b", [{"prompt": "a", "response": "b"}])
    body = json.dumps({"id": "a/b", "sha": commit}).encode()
    hub.faults["revision"] = Fault(status=200, body=body)
    with pytest.raises(ExamplesError, match=r"hf:a/b cannot be read .*it gave no commit"):
        read_rows("hf:a/b?split=train", tmp_path, 1)


def test_rows_that_are_kept_and_damaged_are_read_again(hub: HubServer, tmp_path: Path) -> None:
    put(hub, "a/b", [{"prompt": "a", "response": "b"}])
    read = partial(read_rows, "hf:a/b?split=train", tmp_path, 1)
    assert read() == [Row("a", "b")]
    (kept,) = (tmp_path / "hf" / "meteora").iterdir()
    for damage in (b"", b"[", b"\xff", b'[{"x": 1}]', b"[1]"):
        kept.write_bytes(damage)
        assert read() == [Row("a", "b")], damage
