import pytest

from meteora.base.padding import padded_and_mask

ROWS = [[5, 6], [], [7, 8, 9]]


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("right", [[5, 6, 1], [1, 1, 1], [7, 8, 9]], [[1, 1, 0], [0, 0, 0], [1, 1, 1]]),
        ("left", [[1, 5, 6], [1, 1, 1], [7, 8, 9]], [[0, 1, 1], [0, 0, 0], [1, 1, 1]]),
    ],
)
def test_rows_are_filled_up_at_one_side(side, ids, mask):
    assert [part.tolist() for part in padded_and_mask(ROWS, 1, side)] == [ids, mask]
