"""The pages for users are true: commands parse, recipes are valid, output and messages exist."""

import ast
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from meteora.untrusted.strict_yaml import parse_yaml
from pipelines.cli.app import app
from pipelines.data.row_sources import read_rows
from pipelines.data.spans import read_spans
from pipelines.recipe.recipe import Recipe, locate
from tests.pages import DOCS, PAGES, ROOT, commands, fences, quoted, text_of
from tests.pipelines.cli.command_line import ask

PLACEHOLDERS = {"COMMAND": "run", "STAGE": "gates", "N": "2", "SYSTEM": "base"}
SECTION = re.compile(r"(?:router|gates|benchmark|publish|policy|hub|discover|deadlines): \{.*\}")
LEAST: dict[str, Any] = {
    "base": "owner/name",
    "experts": [
        {"name": name, "adapter": "path:a", "examples": "jsonl:e", "test": "jsonl:t"}
        for name in ("one", "two")
    ],
}
"""What a section of a recipe is put into."""


def named(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in pages]


@pytest.mark.parametrize("page", named(PAGES))
def test_every_command_parses(page: Path) -> None:
    """With its arguments and options as they stand; a name alone is that of a command."""
    for words in commands(page):
        command: Any = typer.main.get_command(app)
        rest = [PLACEHOLDERS.get(word, word) for word in words]
        while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
            assert rest[0] in command.commands, words
            command, rest = command.commands[rest[0]], rest[1:]
        if rest not in ([], ["--help"]):
            command.make_context("meteora", rest)


def test_the_pages_name_every_command() -> None:
    group: Any = typer.main.get_command(app)
    found = {
        (name, *inner)
        for name, command in group.commands.items()
        for inner in ([(one,) for one in getattr(command, "commands", ())] or [()])
        if not command.hidden
    }
    listed = {tuple(words[:2]) for words in commands(ROOT / "pipelines/docs/commands.md")}
    assert found <= listed | {words[:1] for words in listed}


@pytest.mark.parametrize("page", named(PAGES))
def test_every_recipe_is_valid(page: Path, tmp_path: Path) -> None:
    sections = [text for text in quoted(page) if SECTION.fullmatch(text) and "…" not in text]
    for text in [*fences(page, "yaml"), *sections]:
        section: Any = parse_yaml(text, typed=True)
        # what is found has no examples
        least = LEAST | ({"router": {"kind": "arrow"}} if "discover" in section else {})
        others = (f"{key}: {json.dumps(least[key])}" for key in least.keys() - section.keys())
        path = tmp_path / "recipe.yaml"
        path.write_text("\n".join([text, *others]))  # as people write it: JSON quotes keys
        Recipe.load(path)


def test_every_row_is_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in fences(ROOT / "pipelines/docs/own-adapters.md", "json"):
        path.write_text(text)
        assert read_rows("jsonl:rows.jsonl", tmp_path, 9)
    for text in fences(ROOT / "pipelines/docs/gates.md", "json"):
        path.write_text(text)
        assert len(read_spans("jsonl:rows.jsonl", tmp_path, ["dates", "sums"])) == 2


def test_the_reference_of_a_recipe_is_what_the_command_prints() -> None:
    (text,) = fences(ROOT / "pipelines/docs/recipe.md", "text")
    assert text == ask("recipe", "reference").stdout


def test_the_walk_prints_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / "pipelines/docs/own-adapters.md"
    for name in ("arithmetic", "iso_dates"):
        for kind in ("adapters", "tasks"):
            shutil.copytree(locate("quickstart").parent / kind / name, tmp_path / kind / name)
    monkeypatch.chdir(tmp_path)
    for text in fences(page, "console"):
        command, _, shown = text.partition("\n")
        said = ask(*command.removeprefix("$ meteora ").split())
        assert said.returncode == 0, said.stderr
        assert said.stdout == shown
    assert (tmp_path / "recipe.yaml").read_text() == fences(page, "yaml")[0]


@cache
def messages() -> str:
    """Every text in the code, one a line, with `…` in place of what is filled in."""
    found = []
    for package in ("meteora", "pipelines", "store"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(
                            getattr(part, "value", "…") if isinstance(part, ast.Constant) else "…"
                            for part in node.values
                        )
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"\{\w+\}", "…", node.value))
    return "\n".join(found)


def test_every_message_that_is_explained_is_one_of_the_program() -> None:
    quotes = re.findall(r"^> (.+)$", text_of("troubleshooting.md"), re.MULTILINE)
    assert len(quotes) > 40
    assert [quote for quote in quotes if quote not in messages()] == []


def test_there_are_twelve_pages_at_most_and_the_readme_links_to_each() -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(DOCS) <= 12
    assert [page.name for page in DOCS if f"](pipelines/docs/{page.name})" not in readme] == []
