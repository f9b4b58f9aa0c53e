"""`meteora recipe`: the recipes that ship, and every key that a recipe can have."""

import textwrap
from dataclasses import astuple, fields
from typing import Annotated

import typer

from pipelines.cli import options, output
from pipelines.recipe.keys import Key

app = typer.Typer()
recipe = typer.Typer(no_args_is_help=True, help="Show shipped recipes, and the keys of a recipe.")
app.add_typer(recipe, name="recipe")
WIDTH = 80


@recipe.command()
def show(
    name: Annotated[
        str, typer.Argument(help="The name of a shipped recipe. Default: list all names.")
    ] = "",
) -> None:
    """Print a recipe that ships with the program, to start from."""
    from pipelines.recipe.recipe import find_shipped, shipped

    text = find_shipped(name).read_text(encoding="utf-8") if name else "\n".join(shipped())
    print(text.rstrip())


@recipe.command()
def reference(
    form: Annotated[
        output.Format | None, typer.Option("--format", help="Default: a paragraph for each key.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print every key of a recipe: its type, default and range, and what it means."""
    from pipelines.recipe.keys import Key, keys_of
    from pipelines.recipe.recipe import Recipe
    from store.query import Answer

    form = output.form_of(form, as_json=as_json)
    keys = keys_of(Recipe)
    if form is None:
        print("\n\n".join(map(_described, keys)))
        return
    columns = [field.name for field in fields(Key)][:-1]  # the text begins with the kind
    answer = Answer(tuple(columns), [astuple(key)[:-1] for key in keys])
    output.print_answer(answer, form)


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
