"""JSON and YAML from strangers have one meaning, or are refused with a clause that says why."""

import datetime as dt

import pytest

from meteora.untrusted.strict_json import StrictJSONError, parse_object
from meteora.untrusted.strict_yaml import MAX_DEPTH, MAX_NODES, StrictYAMLError, parse_yaml


def test_json_is_read_as_it_is() -> None:
    assert parse_object(b'{"a": [1, -2.5e3, true, null, "\\u00e9"]}') == {
        "a": [1, -2500.0, True, None, "é"]
    }


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b'{"a": 1, "b": {"r": 8, "r": 4}}', "'r' is given twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": [-1e999]}', "-1e999 is too large a number"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": 1,}', "line 1, column [89]"),  # of the brace or, from Python 3.13, of the comma
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "can be read"),
        (b"[1]", "holds a list, not an object"),
        (b"", "not JSON"),
    ],
)
def test_json_with_two_meanings_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(StrictJSONError, match=why):
        parse_object(data)


def test_yaml_has_types_where_they_are_asked_for() -> None:
    text = "rate: 1e-3\ncount: 12\nday: 2026-11-28\nis: true\nat: '1:30'\n"
    assert parse_yaml(text, typed=True) == {
        "rate": 0.001, "count": 12, "day": dt.date(2026, 11, 28), "is": True, "at": "1:30",
    }  # fmt: skip
    assert parse_yaml(text, typed=False) == {
        "rate": "1e-3", "count": "12", "day": "2026-11-28", "is": "true", "at": "1:30",
    }  # fmt: skip
    nothing = parse_yaml("license: null\nnull: [~, 'null', nullable]", typed=False)
    assert nothing == {"license": None, "null": [None, "null", "nullable"]}


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: 1\nb: {c: 1, c: 2}", "'c' is given twice"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than"),
        ("[" + "1," * MAX_NODES + "1]", "more than 100000 values"),
        ("a:\n  b: 1\n c: 2", "how far it is indented"),
        ("a: 'x", "line 1"),
    ],
)
def test_yaml_with_two_meanings_or_too_large_is_refused(
    text: str, why: str, *, typed: bool
) -> None:
    with pytest.raises(StrictYAMLError, match=why):
        parse_yaml(text, typed=typed)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: !!bool maybe", "tags"),
        ("a: &x [1]\nb: *x", "aliases are not allowed"),
        ("a: " + "9" * 400, "more than 1000 bits"),
        ("a: 1:30", r"1:30 is read as a number in base 60 \(line 1, column 4\); write a text in"),
        ("a: " + "1:" * 100_000 + "1", "a number in base 60"),
        ("a: 1:30.5", r"1:30.5 is read as a number in base 60"),
        ("a: " + "1:" * 300 + "1.0", "a number in base 60"),
        ("a: 2026-05-99", "day"),
        (r'a: [1, "b\0"]', r"has a NUL, as no path has \(line 1, column 8\)"),
    ],
)
def test_values_that_python_cannot_take_are_refused(text: str, why: str) -> None:
    with pytest.raises(StrictYAMLError, match=why):
        parse_yaml(text, typed=True)
    assert parse_yaml(text.replace("!!bool ", ""), typed=False)


def test_an_alias_in_untyped_text_is_the_same_value_again() -> None:
    bomb = "\n".join(f"v{n}: &v{n} [{f'*v{n - 1}, ' * 9}]" for n in range(1, 40))
    value = parse_yaml(f"v0: &v0 [mit]\n{bomb}\nlast: *v39", typed=False)
    assert isinstance(value, dict)
    assert value["last"] is value["v39"]
    assert value["v1"][8] == ["mit"]
    with pytest.raises(StrictYAMLError, match="recursive"):
        parse_yaml("a: &x [*x]", typed=False)
