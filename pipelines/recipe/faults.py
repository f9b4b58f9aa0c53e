"""What is wrong in a recipe, in the words of those who write them."""

import json
from collections.abc import Mapping
from datetime import date

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipelines.recipe.keys import Key, keys_of, suggest

INPUT = "Input should be "
"""The beginning of pydantic's messages about types and ranges."""
NUMBERS = ("int_type", "float_type", "bool_type")
"""Pydantic's error types for a value that must be a number, or true or false."""
KINDS = {
    "tuple_type": f"{INPUT}a list",
    "model_type": f"{INPUT}a section, with keys of its own",
}
"""Clearer messages for pydantic's errors about a tuple, and about an instance of a class."""
MOST_FAULTS = 20
"""Most faults of a recipe in one message."""


def explain(error: ValidationError, section: type[BaseModel], whole: str = "recipe") -> str:
    """Each fault of a section, such as a whole recipe, with its place, on one line.

    Args:
        whole: the place of a fault that is in no key
    """
    faults = error.errors()
    keys = {key.path: key for key in keys_of(section)}
    names = {name for path in keys for name in path.split(".")}
    said: dict[str, str] = {}
    for fault in faults[:MOST_FAULTS]:
        unknown, place = fault["type"] == "extra_forbidden", fault["loc"]
        # pydantic adds its names for kinds of sections and values, which are not in the file
        kept = {*names, *(place[-1:] if unknown else ())}
        name = ".".join(str(one) for one in place if isinstance(one, int) or one in kept)
        name = name or whole
        if unknown:
            said[name] = _of_unknown(name, keys)
        elif name in said:  # it is also no value of the other kind that may be there
            message, given, value = said[name].partition(" (given: ")
            other = _message(fault)[0].removeprefix(INPUT)
            said[name] = f"{message} or {other}{given}{value}"
        else:
            said[name] = f"{name}: {''.join(_message(fault))}"
    inner = [text for name, text in said.items() if not any(o.startswith(f"{name}.") for o in said)]
    more = len(faults) - MOST_FAULTS
    return "; ".join([*inner, *([f"and {more:,} more faults"] if more > 0 else [])])


def _of_unknown(name: str, keys: Mapping[str, Key]) -> str:
    """Why a section has no such key."""
    path = ".".join(step for step in name.split(".") if not step.isdecimal())
    if path in keys and (kind := keys[path].kind):
        return f"{name} goes with {kind}, which is not chosen: set it, or take {name} out"
    return f"unknown key {name:.200}{suggest(path, [*keys])}"


def _message(fault: ErrorDetails) -> tuple[str, str]:
    """What is needed, and what is given instead."""
    kind, value = fault["type"], fault["input"]
    message = KINDS.get(kind, fault["msg"].removeprefix("Value error, "))
    if kind in {"missing", "value_error"}:
        return message, ""
    if kind == "too_long":
        length, most = (fault["ctx"][key] for key in ("actual_length", "max_length"))
        return f"has {length:,} items; at most {most:,}", ""
    if kind in NUMBERS and _is_in_quotes(value):
        return message, f" (given: the text {value!r:.60}; write it without quotes)"
    if kind == "string_type" and isinstance(value, bool | int | float | date):
        return (
            message,
            f" (given: {_as_in_yaml(value)}, which YAML reads as no text; write it in quotes)",
        )
    return message, f" (given: {_as_in_yaml(value)})"


def _as_in_yaml(value: object) -> str:
    """A short description of a value of a recipe."""
    if isinstance(value, dict | tuple):
        return "a section" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value!s:.60}" if isinstance(value, date) else f"{value!r:.60}"


def _is_in_quotes(value: object) -> bool:
    """Whether a value is a number, or true or false, in quotes."""
    try:
        return isinstance(value, str) and (value in {"true", "false"} or float(value) is not None)
    except ValueError:
        return False
