"""`import meteora` gives exactly the names that the pages use, and loads nothing heavy."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from importlib import resources

import pytest

import meteora
from tests.pages import PAGES, ROOT, fences

PUBLIC = [
    "__version__",
    "expert_cache",
    "expert_names",
    "force_expert",
    "generate",
    "load",
    "trace",
    "without_experts",
]
FUNCTIONS = PUBLIC[1:]


def test_the_public_names_are_these() -> None:
    assert meteora.__all__ == PUBLIC
    assert dir(meteora) == PUBLIC


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_name_is_a_documented_function(name: str) -> None:
    function = getattr(meteora, name)
    assert inspect.isfunction(function)
    assert function.__name__ == name
    assert inspect.getdoc(function)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(meteora))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == set(FUNCTIONS)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'meteora' has no attribute 'fuse'"):
        getattr(meteora, "fuse")  # noqa: B009  (no type checker allows the attribute itself)


def test_importing_and_listing_load_neither_torch_nor_transformers() -> None:
    code = "import sys, meteora; dir(meteora); meteora.__all__; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "numpy"} & set(loaded.stdout.split())


def test_the_version_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert meteora.__version__ == project["version"]


@pytest.mark.parametrize("package", ["meteora", "pipelines", "store"])
def test_a_package_says_that_it_is_typed(package: str) -> None:
    assert resources.files(package).joinpath("py.typed").is_file()


def test_the_pages_use_public_names_only() -> None:
    used = {name for page in PAGES for name in re.findall(r"\bmeteora\.(\w+)\(", page.read_text())}
    assert used == set(FUNCTIONS)


def test_the_python_of_the_page_on_use_works(
    world, tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = fences(ROOT / "pipelines/docs/use.md", "python")
    model = world.load()
    monkeypatch.setattr(meteora, "load", lambda _name: (model, tokenizer))
    exec(code.replace("iso_dates", "q_and_v"), {})  # noqa: S102
    assert str(meteora.expert_names(model)) in capsys.readouterr().out


def test_answers_and_traces_are_of_the_same_text(world, tokenizer) -> None:
    model = world.load()
    answer = meteora.generate(model, tokenizer, "where to?", max_new_tokens=4)
    found = meteora.trace(model, tokenizer, "where to?", max_new_tokens=4)
    assert "".join(found.pieces[found.num_prompt :]).startswith(answer)
