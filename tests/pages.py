"""The pages for users: the README and those that it links to, in pieces."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "pipelines" / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+)`")


def text_of(name: str) -> str:
    """A page of `pipelines/docs`."""
    return (ROOT / "pipelines" / "docs" / name).read_text()


def fences(page: Path, language: str) -> list[str]:
    """The blocks of a page in one language."""
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def quoted(page: Path) -> list[str]:
    """What stands in the running text of a page as code."""
    return QUOTED.findall(FENCE.sub("", page.read_text()))


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `meteora` of every command on a page.

    Brackets around what may be left out are removed, and of `a|b` the first is taken.
    """
    lines = [
        line
        for name in ("sh", "console")
        for text in fences(page, name)
        for line in text.splitlines()
    ]
    for line in [*lines, *quoted(page)]:
        plain = re.sub(r"(\w)(?:\\?\|\w+)+", r"\1", line).replace("...", "")
        plain = re.sub(r"[\[\]]", "", plain).removeprefix("$ ")
        lexer = shlex.shlex(plain, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            continue  # a quotation mark in code that is no command
        while words:
            end = next((i for i, word in enumerate(words) if word in {"|", "&&", ";"}), len(words))
            first, *others = words[:end] or [""]
            if first.rpartition("/")[2] == "meteora":
                yield others
            words = words[end + 1 :]
