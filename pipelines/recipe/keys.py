"""List every key of a recipe from the schema: its place, type, range, default and meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
}
BOUNDS = {
    "minimum": ">= {}",
    "exclusiveMinimum": "> {}",
    "maximum": "<= {}",
    "exclusiveMaximum": "< {}",
    "minLength": "{} characters at least",
    "maxLength": "{} characters at most",
    "maxItems": "{} at most",
}
TIME = "time"
"""The `format` of a length of time; its default in the schema is in seconds."""


@dataclass(frozen=True)
class Key:
    """A key of a recipe."""

    path: str
    """Such as `benchmark.tasks.name`; keys in a list come after the name of the list."""
    type: str
    needed: bool
    """Whether its section must have it."""
    default: str
    """As in YAML; empty if there is none."""
    range: str
    """The allowed values; empty if all of its type are allowed."""
    text: str
    """Its meaning."""
    kind: str = ""
    """Such as "`method: joint`", if only this kind of its section has it."""


def keys_of(section: type[BaseModel]) -> list[Key]:
    """Every key of a section and of the sections in it, in their order."""
    schema = section.model_json_schema()
    by_path: dict[str, Key] = {}
    for key in _keys(schema, schema.get("$defs", {}), ""):
        first = by_path.setdefault(key.path, key)
        if first.range != key.range:  # two kinds of a section have the key
            by_path[key.path] = replace(first, range=f"{first.range}, {key.range}")
    return list(by_path.values())


def suggest(path: str, known: Sequence[str]) -> str:
    """A clause with a key like an unknown path, for an error message; empty if there is none."""
    above, _, name = path.rpartition(".")
    here = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == above}
    similar = [here[one] for one in get_close_matches(name, list(here), n=1)]
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    guesses = (similar or elsewhere)[:2]
    return f" (did you mean {' or '.join(guesses)}?)" if guesses else ""


def _keys(section: Mapping[str, Any], defs: Mapping[str, Any], above: str) -> Iterator[Key]:
    for name, body in section["properties"].items():
        path = f"{above}{name}"
        values = list(_values(body, defs))
        inner = [value for value in values if "properties" in value]
        text = body.get("description") or (inner[0].get("description", "") if inner else "")
        yield Key(
            path,
            " or ".join(dict.fromkeys(filter(None, map(_type, values)))),
            name in section.get("required", ()),
            "" if inner or "default" not in body else _default(body["default"], values),
            ", ".join(dict.fromkeys(filter(None, map(_range, values)))),
            " ".join(text.split()),
        )
        shared = set.intersection(*(set(value["properties"]) for value in inner)) if inner else ()
        for value in inner:
            for key in _keys(value, defs, f"{path}."):
                own = key.path.removeprefix(f"{path}.").split(".")[0]
                kind = "" if own in shared else _kind(value, inner)
                text = f"With {kind}: {key.text}" if kind else key.text
                yield replace(key, text=text, kind=kind or key.kind)


def _values(
    body: Mapping[str, Any], defs: Mapping[str, Any], within: str = ""
) -> Iterator[dict[str, Any]]:
    """The schema of each kind of value: each choice of a union, and the items of a list.

    Args:
        within: "list of " for items of a list; the schema then has it as `within`
    """
    if "$ref" in body:
        yield from _values(defs[body["$ref"].rpartition("/")[2]], defs, within)
    elif choices := [*body.get("anyOf", ()), *body.get("oneOf", ())]:
        for choice in choices:
            yield from _values(choice, defs, within)
    elif "items" in body:
        yield {"range": _range(body)}
        yield from _values(body["items"], defs, f"{within}list of ")
    elif body.get("type") != "null":
        yield {**body, "within": within}


def _type(value: Mapping[str, Any]) -> str:
    if "properties" in value:
        name = "section"
    elif "enum" in value or "const" in value:
        name = "name"
    elif value.get("format") == TIME:
        name = "time (90s, 30m, 2h, 1d)"
    else:
        name = TYPES.get(value.get("type", ""), "")
    within = value.get("within", "")
    return f"{within}{name}s" if within and name else name


def _kind(section: Mapping[str, Any], choices: Sequence[Mapping[str, Any]]) -> str:
    """The keys that choose one of several kinds of a section; empty if there is one kind."""
    constants = {n: v["const"] for n, v in section["properties"].items() if "const" in v}
    if len(choices) < 2 or not constants:
        return ""
    return ", ".join(f"`{name}: {value}`" for name, value in constants.items())


def _range(value: Mapping[str, Any]) -> str:
    if "range" in value:
        return str(value["range"])
    if options := value.get("enum") or ([value["const"]] if "const" in value else []):
        return ", ".join(map(str, options))
    bounds = (text.format(f"{value[name]:,.10g}") for name, text in BOUNDS.items() if name in value)
    return ", ".join(bounds)


def _default(value: object, values: Sequence[Mapping[str, Any]]) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and any(one.get("format") == TIME for one in values):
        return f"{value / 3600:g}h"
    return value if isinstance(value, str) and value else json.dumps(value)
