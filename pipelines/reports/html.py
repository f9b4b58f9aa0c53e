"""HTML from the templates beside this file. Whatever comes in as text goes out as text."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from meteora.artifacts import MeteoraError
from pipelines.reports import palette

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class PageError(MeteoraError):
    """A page cannot be written where it was asked for."""


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
    """One self-contained page; every value is escaped where it stands."""
    return _templates().get_template(template).render({"palette": palette, **context})


def check_writable(path: Path) -> None:
    """Refuse a place where no file can be written, before the work that would fill it."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PageError(f"{path} cannot be written; give a file in a folder that is there")


def write_page(path: Path, html: str) -> None:
    """Write it whole, or leave what was there."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(html, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise PageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
