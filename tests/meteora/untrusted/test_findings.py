"""What a message says of strangers' files and of other libraries' errors."""

from meteora.untrusted.findings import causes, counted, did_you_mean


def test_one_of_a_kind_has_no_s() -> None:
    said = [counted(number, "row") for number in (0, 1, 2_000)]
    assert said == ["0 rows", "1 row", "2,000 rows"]


def test_causes_in_a_circle_are_each_told_once_and_the_hidden_ones_where_asked_for() -> None:
    first, second, third = ValueError("1"), ValueError("2"), ValueError("3")
    first.__cause__, second.__cause__ = second, third
    third.__cause__ = first
    assert list(causes(first)) == list(causes(first, hidden=True)) == [first, second, third]
    hiding = ValueError("from None")
    hiding.__context__, hiding.__suppress_context__ = first, True
    assert list(causes(hiding)) == [hiding]
    assert list(causes(hiding, hidden=True)) == [hiding, first, second, third]
    assert not list(causes(None))


def test_a_name_in_another_case_is_guessed() -> None:
    assert did_you_mean("DATES", ["sums", "Dates"]) == " (did you mean 'Dates'?)"
    assert did_you_mean("", ["sums"]) == did_you_mean("sums", []) == ""
