"""HTML pages from the folder `templates`. Every value is escaped, so text stays text."""

import os
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from meteora.artifacts import MeteoraError
from store.files import replace_text


class PageError(MeteoraError):
    """A page cannot be written to the chosen path."""


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("pipelines.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, context: Mapping[str, object]) -> str:
    """One self-contained page, from a file in `templates`; a missing variable is an error."""
    return _templates().get_template(template).render(context)


def check_writable(path: Path) -> None:
    """Refuse a path where no file can be written (`PageError`), before the page is made."""
    if path.is_dir():
        raise PageError(f"{path} is a folder; give the name of a file, which may be in it")
    is_no_file = path.exists() and not path.is_file()
    if is_no_file or path.absolute().parent == Path("/dev"):  # where `stdout` may lead to a file
        raise PageError(
            f"{path} is a device or a pipe, or lies among them, and a page would replace it; give"
            " the name of a file elsewhere"
        )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise PageError(f"{path} cannot be written; give a file in a writable folder")


def write_notebook(path: Path, home: Path) -> None:
    """Write the notebook over the ledger of a home; an existing file is a `PageError`."""
    check_writable(path)
    if path.exists():
        raise PageError(f"{path} is there already, perhaps with your changes; give another name")
    ours = resources.files("pipelines.reports").joinpath("templates", "notebook.py")
    text = ours.read_text(encoding="utf-8")
    write_page(path, text.replace('"~/.meteora"', repr(str(home))))


def write_page(path: Path, html: str) -> None:
    """Replace the file at `path` in one step; on a `PageError` its old content stays."""
    try:
        replace_text(path, html)
    except OSError as error:
        raise PageError(f"{path} cannot be written: {error.strerror or error}") from error
