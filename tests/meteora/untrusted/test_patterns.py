"""Patterns from strangers match what `re` matches, in linear time, or are refused."""

import contextlib
import random
import re
import resource
import warnings

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from meteora.untrusted.patterns import Budget, PatternError, matching
from tests.clock import little_work

fuzz = settings(max_examples=1_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])

pieces = st.sampled_from(
    [
        "a",
        "b",
        r"\.",
        ".",
        "a*",
        "b+?",
        "(a|b.)",
        "(?:ab)?",
        "[ab]",
        "[^a-b.]",
        r"\d{1,2}",
        "^",
        "$",
        r"\b",
        "|",
    ]
)


names = st.lists(st.text("ab.12", max_size=8), min_size=1, max_size=4)


@fuzz
@given(source=st.lists(pieces, max_size=6).map("".join), names=names)
def test_patterns_match_what_re_matches(source: str, names: list[str]) -> None:
    whole = {name for name in names if re.fullmatch(source, name)}
    part = {name for name in names if re.match(rf"(.*\.)?({source})$", name)}
    assert matching(source, names, Budget()) == whole
    assert matching(source, names, Budget(), anywhere=True) == part


def test_the_keys_that_an_export_of_a_large_model_writes_are_within_the_budget() -> None:
    """A rank and an alpha of its own for each of 560 modules of a 70B model."""
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(80) for part in "qkvogud"]
    budget = Budget()
    for name in names * 2:
        assert matching(f"^{re.escape(name)}", names, budget, anywhere=True) == {name}


@fuzz
@example(source=r"[\:-2]", names=[""])
@example(source=r"^a\.b", names=["a.b", "aab", "b.a.b"])
@example(source=r"[]\S--[]", names=["a"])
@example(source="a{,2}", names=["a", "aa"])
@example(source="a{02}", names=["aa"])
@example(source="[[:alpha:]]", names=["a"])
@example(source="a)(b", names=["ab"])
@example(source="^*", names=[""])
@given(source=st.text("ab.*+?()[]{}|^$\\,20-:w\n\ud800é", max_size=12), names=names)
def test_any_pattern_is_matched_as_re_does_or_not_at_all(source: str, names: list[str]) -> None:
    try:
        found = matching(source, names, Budget())
    except PatternError:
        return
    with warnings.catch_warnings():  # `[[` and the like may mean more in a later Python
        warnings.simplefilter("ignore", FutureWarning)
        assert found == {name for name in names if re.fullmatch(source, name)}


STALLING = {
    "groups": ["(a+)+x", "((a|a|a)*)*b"],
    "stars": ["(.*)*(.*)*(.*)*y"],
    "counts": ["(.*a){60}", "(.*a.{20}b){20}"],
    "exponential": ["(a|b)*a(a|b){40}", ".*a.{200}b.*"],
    "dots": ["." * 90, "x." * 40],
    "every_name": [".*"],
    "deep": ["(" * 900 + "a" + ")" * 900],
}


@pytest.mark.parametrize("kind", STALLING)
def test_thousands_of_patterns_made_to_stall_do_not(kind: str) -> None:
    """All patterns of one config have one budget; without it these would take hours."""
    draw = random.Random(0)
    names = ["".join(draw.choices("ab.x", [8, 8, 1, 1], k=200)) for _ in range(2_000)]
    budget = Budget()

    def match_all() -> None:
        for source in STALLING[kind] * 100_000:
            matching(source, names, budget, anywhere=True)

    with little_work(), pytest.raises(PatternError, match="too long"):
        match_all()


@pytest.mark.parametrize("source", ["a{999}" * 285, "(a{9}){999}" * 99, "((a{9}){99}){9}", "é" * 9])
def test_a_pattern_of_any_size_takes_little_memory(source: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(PatternError):
        matching(source, ["a" * 500], Budget())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KB
