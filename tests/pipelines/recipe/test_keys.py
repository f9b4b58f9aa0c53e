"""The reference of a recipe names every key of the schema, with all that a person needs."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from pipelines.recipe.keys import keys_of, suggest
from pipelines.recipe.recipe import Recipe

KEYS = {key.path: key for key in keys_of(Recipe)}


def fields_of(section: type[BaseModel], above: str = "") -> Iterator[str]:
    """The path of every field, read off the classes and not off their JSON schema."""
    for name, field in section.model_fields.items():
        yield f"{above}{name}"
        for inner in sections_of(field.annotation):
            yield from fields_of(inner, f"{above}{name}.")


def sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections_of(part)


def test_every_key_is_there_with_its_type_and_its_meaning() -> None:
    assert KEYS.keys() == set(fields_of(Recipe))
    for path, key in KEYS.items():
        assert key.type, path
        assert key.text, path
        assert not (key.needed and key.default), path


@pytest.mark.parametrize(
    ("path", "facts"),
    [
        ("base", ("text", True, "", "")),
        ("router.opening", ("name", False, "shared", "prompt, own, shared")),
        ("router.margin", ("number", False, "", ">= 0, <= 1,000")),
        ("router.null", ("true or false", False, "false", "")),
        ("gates.method", ("name", False, "calibrate", "calibrate, joint")),
        ("gates.composites.n", ("whole number", True, "", ">= 2, <= 50")),
        ("gates.max_grad_norm", ("number", False, "0.3", "> 0, <= 1,000,000")),
        ("benchmark.tasks", ("list of sections", False, "", "")),
        ("benchmark.composite.n", ("whole number", True, "", ">= 2, <= 99")),
        ("deadlines.stack", ("time (90s, 30m, 2h, 1d)", False, "2h", "")),
    ],
)
def test_a_key_has_its_facts(path: str, facts: tuple[str, bool, str, str]) -> None:
    key = KEYS[path]
    assert (key.type, key.needed, key.default, key.range) == facts


def test_a_key_of_one_method_says_of_which() -> None:
    assert KEYS["gates.steps"].text == "With `method: joint`: Optimiser steps."
    assert KEYS["gates.seed"].text.startswith("Seed")


@pytest.mark.parametrize(
    ("unknown", "clause"),
    [
        ("routers", " (did you mean router?)"),
        ("benchmark.limits", " (did you mean benchmark.limit?)"),
        ("hub.limit", " (did you mean discover.limit or benchmark.limit?)"),
        ("zebra", ""),
    ],
)
def test_an_unknown_key_is_told_what_is_like_it(unknown: str, clause: str) -> None:
    assert suggest(unknown, list(KEYS)) == clause
