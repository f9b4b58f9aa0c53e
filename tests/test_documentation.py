"""Every path that a page names exists, and the pages name every room."""

import re
from pathlib import PurePath

import pytest

from tests.pages import DOCS, ROOT

RESULTS = sorted((ROOT / "tests" / "benchmarks" / "results").glob("*.md"))
PAGES = (
    "README.md",
    "meteora/README.md",
    "store/README.md",
    "pipelines/README.md",
    ".github/CONTRIBUTING.md",
    ".github/CHANGELOG.md",
    *(page.relative_to(ROOT).as_posix() for page in (*DOCS, *RESULTS)),
)
PATH = re.compile(r"(?:meteora|pipelines|store|tests|\.github)/[\w./-]*|\w+\.toml")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)")


def named(page: str) -> list[str]:
    """The paths of our own that a page names in code."""
    text = (ROOT / page).read_text()
    quoted = re.findall(r"`([^`\n]+)`", text)
    words = [word for code in quoted for word in code.split() if PATH.fullmatch(word)]
    commands = re.findall(r"\btests/[\w./-]+\b", text)
    return sorted({*words, *commands})


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_exists(page: str) -> None:
    assert [path for path in named(page) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_page_and_a_heading(page: str) -> None:
    for target, heading in LINK.findall((ROOT / page).read_text()):
        path = ROOT / page if not target else ROOT / PurePath(page).parent / target
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE) if heading else []
        anchors = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
        assert not heading or heading in anchors


@pytest.mark.parametrize("package", ["meteora", "pipelines"])
def test_the_page_of_a_package_names_every_room(package: str) -> None:
    rooms = {
        f"{room.parent.relative_to(ROOT).as_posix()}/"
        for room in (ROOT / package).glob("*/__init__.py")
    }
    assert rooms <= set(named(f"{package}/README.md"))


def test_the_page_of_the_store_names_every_file() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "store").iterdir()
        if path.suffix in {".py", ".sql"} and path.stem != "__init__"
    }
    assert files <= set(named("store/README.md"))


def test_the_changelog_has_the_version_of_the_package() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    (newest, *_) = re.findall(r"^## \[(.+)\]", (ROOT / ".github/CHANGELOG.md").read_text(), re.M)
    assert newest == version
