"""`meteora recipe`: the recipes that ship, and every key that a recipe can have."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import AsJson  # noqa: TC001  (typer reads annotations)

if TYPE_CHECKING:
    from pipelines.recipe.keys import Key

app = typer.Typer()
recipe = typer.Typer(no_args_is_help=True, help="Show shipped recipes, and what a recipe can say.")
app.add_typer(recipe, name="recipe")
WIDTH = 80


@recipe.command()
def show(
    name: Annotated[
        str, typer.Argument(help="Of a shipped recipe; without one all are listed.")
    ] = (""),
) -> None:
    """Print a recipe that ships with the program, as a start for one's own."""
    from pipelines.recipe.recipe import find_shipped, shipped

    text = find_shipped(name).read_text(encoding="utf-8") if name else "\n".join(shipped())
    print(text.rstrip())


@recipe.command()
def reference(as_json: AsJson = False) -> None:
    """Print every key of a recipe: its type, default and range, and what it means."""
    from pipelines.recipe.keys import keys_of
    from pipelines.recipe.recipe import Recipe

    keys = keys_of(Recipe)
    if as_json:
        print(json.dumps([asdict(key) for key in keys], indent=1))
    else:
        print("\n\n".join(map(_described, keys)))


def _described(key: Key) -> str:
    """A key in lines: its type, default and range, and below what it means."""
    facts = [
        "needed" if key.needed else "",
        f"default {key.default}" if key.default else "",
        key.range,
    ]
    head = f"{key.path}: {key.type}" + "".join(f"; {fact}" for fact in facts if fact)
    lines = textwrap.wrap(head, WIDTH, subsequent_indent="        ", break_on_hyphens=False)
    indent = "    "
    lines += textwrap.wrap(
        key.text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return "\n".join(lines)
