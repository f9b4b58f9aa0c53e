from __future__ import annotations

import pytest

from meteora.artifacts import canonical_sha256
from pipelines.data.rows import ExamplesError, Row, refuse_overlap, rows_sha256


def test_a_test_row_that_gates_were_fitted_to_is_refused() -> None:
    fitted = {"a": [Row("same  prompt", "x")]}
    with pytest.raises(ExamplesError, match="'same prompt' is also an example of expert a"):
        refuse_overlap(fitted, {"b": [Row("other", "y"), Row("same prompt", "z")]})
    refuse_overlap(fitted, {"b": [Row("other", "y")]})


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
