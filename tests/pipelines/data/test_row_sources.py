import bz2
import gzip
import io
import json
import lzma
import os
import tracemalloc
import zipfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.hub_rows import UnreadableError, text_in
from pipelines.data.row_sources import read_rows
from pipelines.data.rows import ExamplesError, Row

GOOD = '{"prompt": "p", "response": "r"}\n'


def test_rows_are_read_in_order_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(f'{{"prompt": "p{i}", "response": "r{i}", "more": 1}}\n\n' for i in range(5))
    )
    assert read_rows("jsonl:rows.jsonl", tmp_path, 3) == [Row(f"p{i}", f"r{i}") for i in range(3)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param(GOOD + "{}\n", "and it is an empty table", id="no keys"),
        pytest.param('{"ask": 1, "x": 2}', "it is a table with the keys ask, x", id="other keys"),
        pytest.param("[1, 2]", "it is a list of 2, not a table", id="a list"),
        pytest.param(GOOD + "{", "and it is no JSON", id="cut"),
        pytest.param('{"prompt": 1, "response": "r"}', "must be text", id="a number"),
        pytest.param('{"prompt": " ", "response": "r"}', "not empty", id="no prompt"),
        pytest.param(
            r'{"prompt": "a \ud800", "response": "r"}', "half of a surrogate pair", id="surrogate"
        ),
        pytest.param(
            '{"prompt": "p", "response": "a", "choices": "abc"}',
            "line 1: `choices`: a list of texts is needed, and it is abc",
            id="choices are a text",
        ),
        pytest.param(
            '{"prompt": "p", "response": "1", "choices": [1, 2]}',
            "line 1: `choices`: a list of texts is needed, and 1 is none",
            id="choices are numbers",
        ),
        pytest.param(
            '{"prompt": "p", "response": "a", "references": {"b": 1}}',
            "line 1: `references`: a list of texts is needed, and it is a table of 1",
            id="references are a table",
        ),
        pytest.param(
            GOOD + '{"prompt": "p", "response": "r", "prompt": "q"}',
            "line 2: the key 'prompt' is given twice; take one out",
            id="a key twice",
        ),
        pytest.param(
            '{"prompt": "p", "response": "r", "x": ' + "9" * 5000 + "}",
            "line 1: it has a number of thousands of digits",
            id="a long number",
        ),
        pytest.param("\n\n", "no rows in it", id="empty"),
        pytest.param("[" * 100_000, "line 1: not a row", id="deep"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ExamplesError, match=said):
        read_rows("jsonl:rows.jsonl", tmp_path, 10)


@pytest.mark.parametrize("kind", ["jsonl", "bigbench"])
def test_a_pipe_is_not_waited_for(kind: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows")
    with pytest.raises(ExamplesError, match="a pipe, which may never end"):
        read_rows(f"{kind}:rows", tmp_path, 10)


@pytest.mark.parametrize(
    ("source", "said"),
    [("jsonl:/dev/zero", "line 1: longer than"), ("bigbench:/dev/zero", "larger than")],
)
def test_a_file_without_an_end_is_read_up_to_a_bound(
    source: str, said: str, tmp_path: Path
) -> None:
    tracemalloc.start()
    with pytest.raises(ExamplesError, match=said):
        read_rows(source, tmp_path, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 << 20


def test_a_missing_file_and_an_unknown_source_are_named(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match="there is no such file"):
        read_rows("jsonl:none.jsonl", tmp_path, 1)
    with pytest.raises(ExamplesError, match=r"none.jsonl\?part=test: there is no .* no options"):
        read_rows("jsonl:none.jsonl?part=test", tmp_path, 1)
    (tmp_path / "plain").write_text("")
    with pytest.raises(
        ExamplesError, match=r"^plain \(did you mean jsonl:plain\?\): rows come from"
    ):
        read_rows("plain", tmp_path, 1)
    with pytest.raises(ExamplesError, match="rows come from"):
        read_rows("csv:none.csv", tmp_path, 1)


@pytest.mark.parametrize("source", ["", " "])
def test_a_source_that_is_empty_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match=f"the source of rows '{source}' names nothing"):
        read_rows(source, tmp_path, 1)


@pytest.mark.parametrize("kind", ["jsonl", "bigbench", "reasoning_gym", "hf"])
@pytest.mark.parametrize("name", ["", " "])
def test_a_source_without_a_name_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    """An empty name is the working folder."""
    with pytest.raises(ExamplesError, match=f"behind `{kind}:` a file or a data set has to be"):
        read_rows(f"{kind}:{name}", tmp_path, 1)


def test_an_option_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "task.json", PREFERENCES)
    with pytest.raises(ExamplesError, match="the key 'split' is given twice; take one out"):
        read_rows("bigbench:task.json?split=train&split=test", tmp_path, 1)


@pytest.mark.usefixtures("called_here")
def test_a_column_may_have_a_point_in_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flat").mkdir()
    put(tmp_path / "flat", "test.jsonl", {"a.b": "flat", "a": {"b": "inside", "c": "c"}})
    monkeypatch.chdir(tmp_path)
    assert read_rows("hf:flat?prompt=a.b&response=a.c", tmp_path, 1) == [Row("flat", "c")]


def test_a_path_with_a_question_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "why?").mkdir()
    (tmp_path / "why?" / "a=b.jsonl").write_text(GOOD)
    assert read_rows("jsonl:why?/a=b.jsonl", tmp_path, 1) == [Row("p", "r")]


def test_a_row_may_have_choices_and_further_answers(tmp_path: Path) -> None:
    body = {"prompt": "p", "response": "a", "choices": ["a", "b"], "references": ["b"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(body))
    assert read_rows("jsonl:rows.jsonl", tmp_path, 1) == [Row("p", "a", ("a", "b"), ("b",))]
    alone = {"prompt": "p", "response": "forty-two", "references": "42"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(alone))
    assert read_rows("jsonl:rows.jsonl", tmp_path, 1)[0].references == ("42",)
    (tmp_path / "rows.jsonl").write_text(json.dumps(body | {"response": "c"}))
    with pytest.raises(ExamplesError, match="'c' is not one of its choices"):
        read_rows("jsonl:rows.jsonl", tmp_path, 1)


def test_rows_that_windows_wrote_are_read_or_told_how_to_be(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert read_rows("jsonl:rows.jsonl", tmp_path, 1) == [Row("p", "r")]
    for width, order in product((16, 32), ("le", "be")):
        path.write_text(f"\ufeff{GOOD}", encoding=f"utf-{width}-{order}")
        told = rf"UTF-{width}; .* `iconv -f utf-{width} -t utf-8 rows"
        with pytest.raises(ExamplesError, match=told):
            read_rows("jsonl:rows.jsonl", tmp_path, 1)
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\xff")
    with pytest.raises(ExamplesError, match=r"line 2: not UTF-8; .* `iconv -f latin1"):
        read_rows("jsonl:rows.jsonl", tmp_path, 9)


def test_compressed_rows_are_told_how_to_unpack(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", GOOD * 9)
    for data, unpack in (
        (gzip.compress(GOOD.encode()), "gunzip -c"),
        (bz2.compress(GOOD.encode()), "bunzip2 -c"),
        (lzma.compress(GOOD.encode()), "unxz -c"),
        (b"\x28\xb5\x2f\xfd\x24\xff", "unzstd -c"),
        (packed.getvalue(), "unzip -p"),
    ):
        (tmp_path / "rows.jsonl").write_bytes(data)
        with pytest.raises(ExamplesError, match=f"compressed; unpack it with `{unpack} rows"):
            read_rows("jsonl:rows.jsonl", tmp_path, 1)


PREFERENCES: dict[str, Any] = {
    "name": "made-up preferences",
    "task_prefix": "Choose well.\n",
    "metrics": ["multiple_choice_grade"],
    "examples": [
        {"input": "Tea or mud?", "target_scores": {"tea": 1, "mud": 0}},
        {"input": "Tea, mud or milk?", "target_scores": {"mud": 0, "tea": 1, "milk": 1}},
    ],
}
SPELLING: dict[str, Any] = {
    "name": "made-up spelling",
    "example_input_prefix": "\nWord: ",
    "example_output_prefix": "\nSpelled: ",
    "examples": [
        {"input": "tea", "target": "t e a"},
        {"input": "mud", "target": ["m u d", "M U D"]},
    ],
}


def put(folder: Path, name: str, body: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(body))


def test_bigbench_examples_are_asked_as_bigbench_asks_them(tmp_path: Path) -> None:
    put(tmp_path, "task.json", PREFERENCES)
    first, second = read_rows("bigbench:task.json", tmp_path, 9)
    assert first.prompt == "Choose well.\n\nQ: Tea or mud?\n  choice: tea\n  choice: mud\nA:"
    assert (first.response, first.choices, first.references) == ("tea", ("tea", "mud"), ())
    assert second.answers == ("tea", "milk")
    assert second.choices == ("mud", "tea", "milk")

    put(tmp_path, "task.json", PREFERENCES | {"append_choices_to_input": False})
    assert read_rows("bigbench:task.json", tmp_path, 1)[0].prompt.endswith("Tea or mud?\nA:")

    put(tmp_path, "task.json", SPELLING)
    rows = read_rows("bigbench:task.json", tmp_path, 9)
    assert rows == [
        Row("Word: tea\nSpelled:", "t e a"),
        Row("Word: mud\nSpelled:", "m u d", references=("M U D",)),
    ]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ('"x": 1, "x": 0, "y": 0.5', "the key 'x' is given twice"),
        ('"x": 1, "y": NaN', "NaN is not"),
    ],
)
def test_scores_of_bigbench_with_two_meanings_are_refused(
    scores: str, said: str, tmp_path: Path
) -> None:
    text = f'{{"examples": [{{"input": "a", "target_scores": {{{scores}}}}}]}}'
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(ExamplesError, match=f"task.json: not readable as JSON: {said}"):
        read_rows("bigbench:task.json", tmp_path, 9)


def test_a_score_of_bigbench_that_no_float_holds_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "task.json", {"examples": [{"input": "a", "target_scores": {"b": 10**400}}]})
    with pytest.raises(ExamplesError, match="example 1: not an example"):
        read_rows("bigbench:task.json", tmp_path, 9)


def test_bigbench_subtasks_are_read_from_the_file_or_from_folders(tmp_path: Path) -> None:
    both = {"task_prefix": "Go.\n", "subtasks": [PREFERENCES, {"examples": SPELLING["examples"]}]}
    put(tmp_path, "task.json", both)
    rows = read_rows("bigbench:task.json", tmp_path, 9)
    assert [row.prompt.partition("\n")[0] for row in rows] == ["Choose well.", "Go."] * 2

    put(tmp_path, "parts/b/task.json", PREFERENCES)
    put(tmp_path, "parts/a/task.json", SPELLING)
    rows = read_rows("bigbench:parts", tmp_path, 9)
    assert [row.response for row in rows] == ["t e a", "tea", "m u d", "tea"]
    assert len(read_rows("bigbench:parts", tmp_path, 3)) == 3


def test_bigbench_splits_have_no_question_in_common(tmp_path: Path) -> None:
    many = [{"input": f"word {i}", "target": f"{i}"} for i in range(100)]
    put(tmp_path, "task.json", {"examples": many})
    train, test, every = (
        {row.prompt for row in read_rows(f"bigbench:task.json{split}", tmp_path, 999)}
        for split in ("?split=train", "?split=test", "")
    )
    assert not train & test
    assert train | test == every
    assert 10 < len(test) < 30


@pytest.mark.parametrize(
    ("body", "said"),
    [
        pytest.param([], "it holds a list, not an object", id="a list"),
        pytest.param({"examples": {}}, "needs a list `examples`", id="no list"),
        pytest.param({"examples": [{"target": "x"}]}, "example 1: not an example", id="no input"),
        pytest.param({"examples": [{"input": "x"}]}, "example 1: not an example", id="no target"),
        pytest.param({"examples": [{"input": "x", "target": []}]}, "example 1", id="no answer"),
        pytest.param({"examples": [{"input": "x", "target": 3}]}, "must be text", id="a number"),
        pytest.param({"examples": []}, "no rows in it", id="empty"),
    ],
)
def test_a_bad_bigbench_task_is_refused_with_its_place(
    tmp_path: Path, body: Any, said: str
) -> None:
    put(tmp_path, "task.json", body)
    with pytest.raises(ExamplesError, match=said):
        read_rows("bigbench:task.json", tmp_path, 9)


def test_unknown_parts_of_a_source_are_named(tmp_path: Path) -> None:
    put(tmp_path, "task.json", PREFERENCES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExamplesError, match="unknown option 'half'; bigbench takes split"):
        read_rows("bigbench:task.json?half=1", tmp_path, 1)
    with pytest.raises(ExamplesError, match="split='dev' is none of"):
        read_rows("bigbench:task.json?split=dev", tmp_path, 1)
    with pytest.raises(ExamplesError, match=r"there is no task\.json"):
        read_rows("bigbench:.", tmp_path / "empty", 1)
    with pytest.raises(ExamplesError, match="not readable as JSON"):
        read_rows("bigbench:none.json", tmp_path, 1)


def test_reasoning_gym_makes_the_same_rows_of_a_name_and_a_seed(tmp_path: Path) -> None:
    first = read_rows("reasoning_gym:chain_sum", tmp_path, 4)
    assert first == read_rows("reasoning_gym:chain_sum?seed=0", tmp_path, 6)[:4]
    other = read_rows("reasoning_gym:chain_sum?seed=1000", tmp_path, 4)
    assert not {row.prompt for row in first} & {row.prompt for row in other}
    assert [row.checker for row in first] == [
        f"reasoning_gym:chain_sum@0#{number}" for number in range(4)
    ]
    with pytest.raises(ExamplesError, match="not registered"):
        read_rows("reasoning_gym:no_such_task", tmp_path, 1)
    with pytest.raises(ExamplesError, match="is not a number"):
        read_rows("reasoning_gym:chain_sum?seed=x", tmp_path, 1)


def test_a_hub_dataset_out_of_reach_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnreadableError, match=r"hf:nobody/none cannot be read from the Hub \(.+\)"):
        read_rows("hf:nobody/none", tmp_path, 1)


@pytest.mark.usefixtures("called_here")
def test_a_hub_dataset_is_asked_as_its_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder of the dataset's name, which `datasets` takes for the dataset."""
    rows = [
        {
            "id": i,
            "said": {"de": f"Satz {i}" + "!" * i, "en": f"sentence {i}"},
            "more": "," * (i % 2),
            "choices": {"label": ["A", "B"], "text": [f"sentence {i}", "none"]},
            "gap": "there" if i % 2 else None,
            "turns": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "none"}],
        }
        for i in range(60)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "somebody/news/de-en").mkdir(parents=True)
    (tmp_path / "somebody/news/de-en/train.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def read(*options: str) -> list[Row]:
        shown = "&".join(("split=train", *options))
        return read_rows(f"hf:somebody/news?{shown}", tmp_path, 99)

    columns = ("prompt=said.de,more", "response=said.en")
    every = read(*columns, "ask=To+English:%0A")
    assert every[0] == Row("To English:\nSatz 0", "sentence 0", ("sentence 0", "none"))
    assert every[1].prompt == "To English:\nSatz 1!\n\n,"
    assert read(*columns, "choices=")[0].choices == ()
    train, test = (read(*columns, f"part={part}") for part in ("train", "test"))
    assert not {row.prompt for row in train} & {row.prompt for row in test}
    assert len(train) + len(test) == len(every) == 60
    assert 3 < len(test) < 25
    assert max(len(row.prompt) for row in read(*columns, "longest=20")) in range(15, 21)
    gaps = ("prompt=gap", "response=said.en", "ask=To+English:+")
    assert [row.prompt for row in read(*gaps, "incomplete=skip")] == ["To English: there"] * 30
    assert read("prompt=gap,said.de", "response=said.en")[0].prompt == "Satz 0"
    assert (read("turns=turns")[0].prompt, read("turns=turns")[0].response) == ("0?", "none")
    for options, said in (
        (gaps, "a row has no text in its column 'gap'"),
        ((*gaps, "incomplete=yes"), "incomplete='yes' is none of refuse, skip"),
        ((*columns, "choices=options"), "no column 'options', it has id, said"),
        ((*columns, "choices=more"), r"its column 'more' \(choices= leaves it out\): a list of"),
        ((*columns, f"revision={'a' * 40}"), "the folder somebody/news in the working folder"),
        (("turns=said",), "a row has no question with an answer as text in its column 'said'"),
        (("turns=said", "ask=Say"), "a row has no question with an answer as text in its column"),
        (("turns=tunrs",), "no column 'tunrs', it has id, said"),
        (("turns=turns", "prompt=id"), "turns='turns' has question and answer, so take prompt out"),
        (
            ("prompt=said.fr", "response=said.en"),
            "no column 'said.fr', it has id, said, more",
        ),
        (("prompt=id", "response=said.en"), "column 'id' is not text"),
        ((*columns, "part=dev"), "part='dev' is none of all, train, test"),
        ((*columns, "longest=x"), "longest='x' is not a number"),
    ):
        with pytest.raises(ExamplesError, match=said):
            read(*options)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.data.row_sources.MAX_ROW_CHARACTERS", 8)
        with pytest.raises(ExamplesError, match="row 0: its answer has more than 8 characters"):
            read(*columns)
    pool = read_rows("hf:somebody/news?split=train&prompt=said.de", tmp_path, 2, answered=False)
    assert pool == [Row("Satz 0", ""), Row("Satz 1!", "")]


def test_a_prompt_of_a_pool_needs_no_response(tmp_path: Path) -> None:
    lines = '{"prompt": "a", "response": null, "choices": ["x", "y"]}\n{"prompt": "b"}\n'
    (tmp_path / "pool.jsonl").write_text(lines)
    found = read_rows("jsonl:pool.jsonl", tmp_path, 9, answered=False)
    assert found == [Row("a", ""), Row("b", "")]
    with pytest.raises(ExamplesError, match="must be text"):
        read_rows("jsonl:pool.jsonl", tmp_path, 9)


@pytest.mark.network
def test_a_hub_dataset_is_read_by_its_columns(tmp_path: Path) -> None:
    source = "hf:openai/gsm8k?config=main&prompt=question&response=answer"
    rows = read_rows(source, tmp_path, 3)
    assert len(rows) == 3
    assert all("####" in row.response for row in rows)
    with pytest.raises(ExamplesError, match="no column 'prompt', it has question, answer"):
        read_rows("hf:openai/gsm8k?config=main&response=answer", tmp_path, 1)


def test_a_place_in_a_list_with_more_digits_than_python_reads_is_no_column() -> None:
    for place, text in (("0", "hi"), ("1", "there")):
        assert text_in({"said": ["hi", "there"]}, f"said.{place}", "a/b", may_miss=False) == text
    for place in ("2", "9" * 5_000):
        with pytest.raises(ExamplesError, match="a/b has no column"):
            text_in({"said": ["hi", "there"]}, f"said.{place}", "a/b", may_miss=False)
