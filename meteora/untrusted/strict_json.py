"""JSON with exactly one meaning: text that parsers read in different ways is refused."""

import json
import math
from collections import Counter
from typing import Any


class StrictJSONError(ValueError):
    """The text is not JSON with exactly one meaning; the message is a clause that says why."""


def parse_object(data: bytes) -> dict[str, Any]:
    """Return the object that `data` holds.

    Raises:
        StrictJSONError: It is not JSON, or it has something that only some parsers accept: a key
            given twice (they keep the first or the last), `NaN`, `Infinity` or a number as large
            as that, a byte order mark, or nesting as deep as the interpreter's stack.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        raise StrictJSONError(f"it is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise StrictJSONError(
            f"it is not JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise StrictJSONError("it is nested too deeply") from None
    except StrictJSONError:
        raise
    except ValueError as error:  # such as an integer of more than 4,300 digits
        raise StrictJSONError(f"it is not JSON that can be read: {str(error)[:80]}") from None
    if not isinstance(value, dict):
        raise StrictJSONError(f"it holds a {type(value).__name__}, not an object")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON, as `object_pairs_hook`.

    Raises:
        StrictJSONError: A key is given twice.
    """
    value = dict(pairs)
    if len(value) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise StrictJSONError(f"the key {twice[:60]!r} is given twice")
    return value


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise StrictJSONError(f"{text[:60]} is too large a number")
    return value


def _no_constant(name: str) -> float:
    raise StrictJSONError(f"{name} is not a number")
