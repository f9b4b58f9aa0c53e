"""What answers are worth together: by row, by task and by turn."""

import json
from pathlib import Path
from typing import Any

import pytest

from meteora.artifacts import ScorePart, ScoreTurn
from pipelines.scoring.outputs import (
    OutputsError,
    compute_composite_values,
    compute_conversation_values,
    read_outputs,
    write_outputs,
)

JUDGED_BY = json.dumps({"sums": "numeric_match", "words": "exact_match"})


def asked(*questions: tuple[str, str]) -> str:
    body = [[task, {"prompt": "?", "response": answer}] for task, answer in questions]
    return json.dumps({"questions": body})


def turn(output: str, prompt: int, computed: int, new: int, seconds: float) -> dict[str, Any]:
    return {
        "output": output,
        "prompt_tokens": prompt,
        "computed_tokens": computed,
        "new_tokens": new,
        "seconds": seconds,
    }


def test_a_conversation_is_worth_the_mean_of_its_turns() -> None:
    rows = [
        {
            "asked": asked(("words", "red"), ("sums", "7")),
            "judged_by": JUDGED_BY,
            "turns": json.dumps([turn("red", 10, 10, 1, 0.5), turn("8", 20, 9, 2, 1.0)]),
        },
        {
            "asked": asked(("sums", "3"), ("words", "blue")),
            "judged_by": JUDGED_BY,
            "turns": json.dumps([turn("3.0", 12, 12, 3, 0.25), turn(" ", 30, 17, 4, 2.0)]),
        },
    ]
    (found,) = compute_conversation_values(rows).values()
    assert (found.values, found.mean, found.graded) == ((0.5, 0.5), 0.5, True)
    assert found.parts == (ScorePart("sums", 0.5, 2, 2), ScorePart("words", 0.5, 2, 1))
    assert found.turns == (
        ScoreTurn(1, 1.0, 11.0, 11.0, 2.0, 0.375),
        ScoreTurn(2, 0.0, 25.0, 13.0, 3.0, 1.5),
    )


def test_a_composite_is_worth_the_share_of_its_questions() -> None:
    three = asked(("words", "red"), ("sums", "7"), ("sums", "9"))
    rows = [
        {"asked": three, "judged_by": JUDGED_BY, "output": "1. red\n3. it is 9"},
        {"asked": three, "judged_by": JUDGED_BY, "output": "1. green\n2. 7\n3. 8"},
    ]
    right, attempted = compute_composite_values(rows).values()
    assert right.values == (2 / 3, 1 / 3)
    assert right.parts == (ScorePart("sums", 0.5, 4, 3), ScorePart("words", 0.5, 2, 2))
    assert attempted.values == (2 / 3, 1.0)
    assert attempted.parts == (ScorePart("sums", 0.75, 4, 3), ScorePart("words", 1.0, 2, 2))


@pytest.mark.parametrize("place", [10, 40, -1], ids=["page", "data", "end"])
def test_damaged_answers_are_one_sentence(place: int, tmp_path: Path) -> None:
    """As of a blob that is too large to be hashed whenever it is read."""
    path = tmp_path / "outputs"
    write_outputs([{"output": "an answer" * 99}] * 9, path)
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(OutputsError, match=r"the answers in .* cannot be read \("):
        read_outputs(path)
