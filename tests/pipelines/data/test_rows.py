import pytest

from meteora.artifacts import canonical_sha256
from pipelines.data.rows import ExamplesError, Row, differing_part, refuse_overlap, rows_sha256


def test_a_test_row_that_gates_were_fitted_to_is_refused() -> None:
    fitted = {"a": [Row("same  prompt", "x")]}
    sentence = "task b: row 2 with the prompt 'same prompt' is also an example of expert a, row 1;"
    with pytest.raises(ExamplesError, match=sentence):
        refuse_overlap(fitted, {"b": [Row("other", "y"), Row("same prompt", "z")]})
    refuse_overlap(fitted, {"b": [Row("other", "y")]})


def test_a_test_row_in_another_unicode_form_is_the_same_question() -> None:
    with pytest.raises(ExamplesError, match="is also an example"):
        refuse_overlap({"a": [Row("caf\u00e9", "x")]}, {"b": [Row("cafe\u0301", "x")]})
    assert Row("caf\u00e9", "x").sha256 != Row("cafe\u0301", "x").sha256  # what divides rows stays


def test_an_overlap_is_told_with_its_count_and_the_part_that_differs() -> None:
    start = "Answer with nothing but the result, as a number, and without any words. What is "
    rows = [Row(f"{start}{n} + {n}?", "x") for n in range(5)]
    with pytest.raises(ExamplesError, match=r"'…2 \+ 2\?' is also .*; there are 3 such test rows"):
        refuse_overlap({"sums": rows}, {"sums": rows[2:]})
    assert differing_part("short", ["short", "shore"]) == "short"
    assert differing_part("x" * 100, ["x" * 100]) == "x" * 80 + "…"


def test_the_hash_of_rows_depends_on_their_order_and_every_letter() -> None:
    one, two = Row("a", "b"), Row("b", "a")
    hashes = {rows_sha256(rows) for rows in ([one, two], [two, one], [one], [one, one])}
    assert len(hashes) == 4


def test_a_row_hashes_by_what_is_set_in_it() -> None:
    """A row of two texts hashes as before rows could have choices: its scores stay valid."""
    assert Row("p", "r").to_dict() == {"prompt": "p", "response": "r"}
    assert rows_sha256([Row("p", "r")]) == canonical_sha256([{"prompt": "p", "response": "r"}])
    row = Row("p", "r", choices=("r", "s"), references=("s",))
    assert Row.from_dict(row.to_dict()) == row
    assert rows_sha256([row]) != rows_sha256([Row("p", "r")])
