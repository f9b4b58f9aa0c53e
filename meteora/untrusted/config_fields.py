"""Fields of an untrusted config: each is read as its type, or refused with its name.

Each function records what is wrong in `found` and returns a neutral value, so that one reading
names every fault.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from meteora.untrusted.findings import Findings, listed, shortened

if TYPE_CHECKING:
    import re


T = TypeVar("T")

MAX_RANK = 4_096
MIN_ALPHA = 1e-20
"""Smaller ones give scalings that no checkpoint has."""
MAX_ALPHA = 1e6
MAX_ENTRIES = 20_000
"""Keys of `rank_pattern` or `alpha_pattern`, and modules that a list targets."""
MAX_NAMES = 64
"""Modules that any other list names."""
MAX_NAME = 512
"""Characters of the name of a base or a module; no tensor has a longer one."""
MAX_TEXT = 2_000
"""Characters of a pattern."""
MAX_SHORT = 256
"""Characters of any other text."""


def base_model(name: object, found: Findings) -> str:
    """Read the name of the base; empty if there is none. An odd name gets a warning."""
    if name in (None, ""):
        found.warn("base_unnamed", "it names no base; only its shapes show whether it fits")
        return ""
    if not isinstance(name, str) or len(name) > MAX_NAME or not name.isprintable():
        found.warn("base_unreadable", "its base is not a printable name; it is ignored")
        return ""
    lower = name.lower()
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or ":" in name:
        found.warn("base_local_path", f"its base is a path on another machine: {shortened(name)}")
    elif any(mark in lower for mark in ("4bit", "8bit", "-bnb", "-gptq", "-awq", "_nf4")):
        found.warn(
            "base_quantized",
            f"it was trained on a quantised copy, {shortened(name)}; on another copy it gives"
            " answers that are close, not equal",
        )
    return name


def targets(config: Mapping[str, Any], key: str, found: Findings) -> tuple[str, ...] | str:
    """Read modules, given by names or by a pattern; empty where the field is not set."""
    value = config.get(key)
    if value is None:
        return ()
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            found.refuse("pattern", f"{key} has {len(value)} characters, more than {MAX_TEXT}")
            return ()
        return value
    if not _are_names(value, MAX_ENTRIES):
        found.refuse(
            key, f"{key} is neither a list of names, at most {MAX_ENTRIES} of them, nor a pattern"
        )
        return ()
    return tuple(sorted(set(value)))


def names(config: Mapping[str, Any], key: str, found: Findings) -> tuple[str, ...]:
    """Read a list of module names, sorted."""
    value = config.get(key) or []
    if not _are_names(value, MAX_NAMES):
        found.refuse(key, f"{key} is not a list of at most {MAX_NAMES} names")
        return ()
    return tuple(sorted(set(value)))


def _are_names(value: object, most: int) -> TypeGuard[list[str]]:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(isinstance(name, str) and len(name) <= MAX_NAME for name in value)
    )


def text(config: Mapping[str, Any], key: str, found: Findings) -> str:
    """Read a short printable text; empty where the field is not set."""
    value = config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_SHORT or not value.isprintable():
        found.refuse(key, f"{key} is not a short text")
        return ""
    return value


def flag(config: Mapping[str, Any], key: str, found: Findings) -> bool:
    """Read a boolean; false where the field is not set."""
    value = config.get(key)
    if value is not None and type(value) is not bool:
        found.refuse(key, f"{key} is {shortened(value)!r}, neither true nor false")
    return value is True


def pattern_table(
    config: Mapping[str, Any], key: str, read: Callable[[object, str, Findings], T], found: Findings
) -> tuple[tuple[str, T], ...]:
    """Read a table of patterns, in the order of the file.

    Args:
        read: reads one value, from the value and its place in the config
    """
    table = config.get(key) or {}
    if not isinstance(table, dict) or len(table) > MAX_ENTRIES:
        found.refuse(key, f"{key} is not a table of at most {MAX_ENTRIES} modules")
        return ()
    return tuple((name, read(v, f"{key}[{shortened(name)}]", found)) for name, v in table.items())


def rank(value: object, where: str, found: Findings) -> int:
    """Read a rank; 0 where it is refused."""
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        quotes = ", a whole number without quotes" if isinstance(value, str) else ""
        found.refuse("rank", f"{where} is {shortened(value)!r}; it must be 1 to {MAX_RANK}{quotes}")
        return 0
    return value


def alpha(value: object, where: str, found: Findings) -> float:
    """Read an alpha; 0 where it is refused."""
    read = number(value)
    if read is None or not MIN_ALPHA <= read <= MAX_ALPHA:
        found.refuse(
            "alpha",
            f"{where} is {shortened(value)!r}; it must be a number from {MIN_ALPHA} to 10^6",
        )
        return 0.0
    return read


def number(value: object) -> float | None:
    """Return a finite number of ordinary size, else None; `true` and "8" are not numbers."""
    if isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e300:
        return float(value)
    return None


def whole(value: object, where: str, least: int, most: int, found: Findings) -> int:
    """Read a whole number; `least` where it is refused."""
    if type(value) is not int or not least <= value <= most:
        found.refuse(
            where,
            f"{where} is {shortened(value)!r}; it must be a whole number from {least} to {most}",
        )
        return least
    return value


def real(value: object, where: str, least: float, most: float, found: Findings) -> float:
    """Read a finite number; `most` where it is refused."""
    read = number(value)
    if read is None or not least <= read <= most:
        found.refuse(
            where,
            f"{where} is {shortened(value)!r}; it must be a number from {least:g} to {most:g}",
        )
        return most
    return read


def one_of(value: object, where: str, options: Sequence[str], found: Findings) -> str:
    """Read one of several words; the first of them where it is refused."""
    if not isinstance(value, str) or value not in options:
        known = ", ".join(repr(option) for option in options)
        found.refuse(where, f"{where} is {shortened(value)!r}; it must be one of {known}")
        return options[0]
    return value


def matching(value: object, where: str, pattern: re.Pattern[str], found: Findings) -> str:
    """Read a printable text of a given form; empty where it is refused."""
    if not isinstance(value, str) or not value.isprintable() or not pattern.fullmatch(value):
        found.refuse(where, f"{where} is {shortened(value)!r}, which has another form than needed")
        return ""
    return value


def table(config: Mapping[str, Any], key: str, found: Findings) -> dict[str, Any]:
    """Read a table; empty where it is refused."""
    value = config.get(key)
    if not isinstance(value, dict):
        found.refuse(key, f"{key} is {shortened(value)!r}, not a table")
        return {}
    return value


def rows(config: Mapping[str, Any], key: str, most: int, found: Findings) -> list[Any]:
    """Read a list; empty where it is refused."""
    value = config.get(key)
    if not isinstance(value, list) or len(value) > most:
        found.refuse(key, f"{key} is {shortened(value)!r}, not a list of at most {most}")
        return []
    return value


def refuse_unknown(
    config: Mapping[str, Any], where: str, known: Collection[str], found: Findings
) -> None:
    """Refuse unknown keys that are set: they may change the meaning of the others."""
    unknown = sorted(key for key in config if key not in known and is_active(config[key]))
    if unknown:
        found.refuse(
            "unknown_key",
            f"{listed(unknown)} of {where} is set and not known here; a newer version may know it",
        )


def plain(value: object, where: str, found: Findings, depth: int = 4) -> Any:  # noqa: ANN401
    """Read any JSON value of little depth; its texts may have control characters."""
    if value is None or type(value) is bool or isinstance(value, str) or number(value) is not None:
        return value
    if depth and isinstance(value, list):
        return [plain(item, where, found, depth - 1) for item in value]
    if depth and isinstance(value, dict):
        return {key: plain(item, where, found, depth - 1) for key, item in value.items()}
    found.refuse(where, f"{where} is nested too deeply, or holds a number that is too large")
    return None


def is_active(value: object) -> bool:
    """Return whether a field is set: not null, false, zero or empty."""
    return value not in (None, False, "", 0) and value not in ([], {})
