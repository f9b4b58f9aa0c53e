"""A card is a stranger's text: two facts are read from it, and nothing in it can stall a run."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.hub.card import base_of, licence_of
from tests.clock import little_work


def card(folder: Path, text: str) -> Path:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("lines", "licence", "base"),
    [
        ("license: mit\nbase_model: org/base", "mit", "org/base"),
        ("license: 'mit' # mine\nbase_model: \"org/base\"", "mit", "org/base"),
        ("base_model:\n- org/base\nlicense: mit", "mit", "org/base"),
        ("base_model:\n  - org/base  # a copy\nlicense: mit", "mit", "org/base"),
        ("license: [mit]\nbase_model: [org/base]", "mit", "org/base"),
        ("base_model: [org/base, org/other]\nlicense:\n- mit\n- apache-2.0", "mit, apache-2.0", ""),
        ("base_model:\n- org/base\n- org/other\nlicense: mit", "mit", ""),
        ("base_model:\nlicense: mit", "mit", ""),
        ("license: # none yet\ntags:\n- license: mit", "", ""),
        ("license: all rights reserved\nbase_model: " + "a" * 999, "all rights reserved", ""),
        ("license: CC BY-NC-ND 4.0\nbase_model: org / base", "CC BY-NC-ND 4.0", ""),
        ("license: >-\n  mit\nbase_model: {name: org/base}", "mit", ""),
        ("license: mit\nlicense: gpl\nbase_model: org/base", "", ""),
        ("license: &a mit\nbase_model: *a", "mit", "mit"),
        ("tags: &id001\n- lora\nlicense: cc-by-nd-4.0\nmore: *id001", "cc-by-nd-4.0", ""),
        ("license: " + "All rights reserved. " * 10, "other", ""),
        ("license: |\n  No derivatives.\n  No more.\nbase_model: org/base", "other", "org/base"),
        ("license: {name: mit}\nbase_model: org/base", "other", "org/base"),
        (
            "license: [" + "a-licence-of-its-own, " * 5 + ", ".join(map(str, range(99))) + "]",
            "other",
            "",
        ),
        ("license: 1.0\nbase_model: 2020-99-99", "1.0", "2020-99-99"),
    ],
)
def test_licence_and_base_are_read(lines: str, licence: str, base: str, tmp_path: Path) -> None:
    folder = card(tmp_path, f"---\n{lines}\n---\nlicense: gpl\nbase_model: org/wrong\n")
    assert (licence_of(folder), base_of(folder)) == (licence, base)
    assert licence_of(card(tmp_path, lines)) == ""


def test_a_card_that_windows_has_saved_is_read(tmp_path: Path) -> None:
    """Without its licence a local adapter would count as one's own."""
    text = "\ufeff---\r\nlicense: cc-by-nd-4.0\r\n---\r\n# An adapter\r\n"
    (tmp_path / "README.md").write_bytes(text.encode())
    assert licence_of(tmp_path) == "cc-by-nd-4.0"


@pytest.mark.parametrize(
    "text",
    [
        "---\nbase_model:\n  " + "-" * 999_000 + " -a -b\n---\n",
        "---\nbase_model:" + " " * 999_000 + "\n---\n",
        " " * 999_000,
        "---\n" * 240_000,
        "---\n" + "base_model:\n" * 80_000 + "---\n",
        "---\nlicense: [" + "a," * 490_000 + "\n---\n",
        "---\nlicense: [" + "[]," * 330_000 + "]\n---\n",
        "---\nbase_model: " + "[" * 999_000 + "\n---\n",
        "---\n" + "\n".join(f"{i:x}:" for i in range(140_000)) + "\n---\n",
        "---\nlicense: 1" + ":1" * 490_000 + "\n---\n",
    ],
    ids=[
        "dashes",
        "spaces",
        "blank",
        "rules",
        "keys",
        "list",
        "lists",
        "deep",
        "other_keys",
        "60s",
    ],
)
def test_a_megabyte_made_to_stall_does_not(text: str, tmp_path: Path) -> None:
    folder = card(tmp_path, text)
    with little_work():
        assert (licence_of(folder) in {"", "a", "other"}, base_of(folder)) == (True, "")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.text() | st.text("-:#[]'\" \nbase_modlicn", max_size=200))
def test_any_card_gives_short_printable_words(lines: str, tmp_path: Path) -> None:
    folder = card(tmp_path, f"---\nlicense:{lines}")
    for word in (licence_of(folder), base_of(folder)):
        assert len(word) <= 200
        assert word.isprintable()
