"""Fields of an untrusted config: each is read as its type, or refused with its name.

    field = fields_of(config, found)
    r, bias = field("r", 8).rank(), field("bias", "none").one_of(BIASES)

Each reading records what is wrong in `found` and returns a neutral value, so that one pass names
every fault.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

from meteora.untrusted.findings import Findings, listed, quoted, shortened

T = TypeVar("T")

MAX_RANK = 4_096
MIN_ALPHA = 1e-20
"""Smaller ones give scalings that no checkpoint has."""
MAX_ALPHA = 1e6
ALL_LINEAR = "all-linear"
"""In place of names: every linear layer of the base but its head."""
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


@dataclass(frozen=True, slots=True)
class Field:
    """One value of a config. None stands for a field that is not set."""

    value: Any
    where: str
    """Its name in messages."""
    found: Findings

    def refuse(self, message: str, code: str = "") -> None:
        """Record a fault: a clause about the field, and a code if that is not its name."""
        self.found.refuse(code or self.where, f"{self.where} {message}")

    def text(self) -> str:
        """Read a short printable text; empty where the field is not set."""
        value = self.value
        if value is None:
            return ""
        if not isinstance(value, str) or len(value) > MAX_SHORT or not value.isprintable():
            self.refuse("is not a short text")
            return ""
        return value

    def flag(self) -> bool:
        """Read a boolean; false where the field is not set."""
        if self.value is not None and type(self.value) is not bool:
            self.refuse(f"is {quoted(self.value)}, neither true nor false")
        return self.value is True

    def rank(self) -> int:
        """Read a rank; 0 where it is refused."""
        value = self.value
        if type(value) is not int or not 1 <= value <= MAX_RANK:
            kind = "" if type(value) is int else f", a whole number{unlike(value)}"
            self.refuse(f"is {quoted(value)}; it must be 1 to {MAX_RANK}{kind}", "rank")
            return 0
        return value

    def alpha(self) -> float:
        """Read an alpha; 0 where it is refused."""
        read = number(self.value)
        if read is None or not MIN_ALPHA <= read <= MAX_ALPHA:
            needed = f"it must be a number from {MIN_ALPHA} to 10^6{unlike(self.value)}"
            self.refuse(f"is {quoted(self.value)}; {needed}", "alpha")
            return 0.0
        return read

    def whole(self, least: int, most: int) -> int:
        """Read a whole number; `least` where it is refused."""
        value = self.value
        if type(value) is not int or not least <= value <= most:
            needed = f"it must be a whole number from {least} to {most}"
            self.refuse(f"is {quoted(value)}; {needed}")
            return least
        return value

    def real(self, least: float, most: float) -> float:
        """Read a finite number; `most` where it is refused."""
        read = number(self.value)
        if read is None or not least <= read <= most:
            needed = f"it must be a number from {least:g} to {most:g}"
            self.refuse(f"is {quoted(self.value)}; {needed}")
            return most
        return read

    def one_of(self, options: Sequence[str]) -> str:
        """Read one of several words; the first of them where it is refused."""
        if not isinstance(self.value, str) or self.value not in options:
            known = ", ".join(repr(option) for option in options)
            self.refuse(f"is {quoted(self.value)}; it must be one of {known}")
            return options[0]
        return self.value

    def matching(self, pattern: re.Pattern[str]) -> str:
        """Read a printable text of a given form; empty where it is refused."""
        value = self.value
        if not isinstance(value, str) or not value.isprintable() or not pattern.fullmatch(value):
            self.refuse(f"is {quoted(value)}, which has another form than needed")
            return ""
        return value

    def table(self) -> dict[str, Any]:
        """Read a table; empty where it is refused."""
        if not isinstance(self.value, dict):
            self.refuse(f"is {quoted(self.value)}, not a table")
            return {}
        return self.value

    def rows(self, most: int) -> list[Any]:
        """Read a list; empty where it is refused."""
        if not isinstance(self.value, list) or len(self.value) > most:
            self.refuse(f"is {quoted(self.value)}, not a list of at most {most}")
            return []
        return self.value

    def names(self) -> tuple[str, ...]:
        """Read a list of module names, sorted."""
        value = self.value or []
        if not _are_names(value, MAX_NAMES):
            self.refuse(f"is not a list of at most {MAX_NAMES} names")
            return ()
        return tuple(sorted(set(value)))

    def targets(self) -> tuple[str, ...] | str:
        """Read modules, given by names or by a pattern; empty where the field is not set."""
        value = self.value
        if value is None:
            return ()
        if isinstance(value, str):
            if len(value) > MAX_TEXT:
                self.refuse(f"has {len(value)} characters, more than {MAX_TEXT}", "pattern")
                return ()
            return value.lower() if value.lower() == ALL_LINEAR else value  # as PEFT reads it
        if not _are_names(value, MAX_ENTRIES):
            most = f"at most {MAX_ENTRIES} of them"
            self.refuse(f"is neither a list of names, {most}, nor a pattern")
            return ()
        return tuple(sorted(set(value)))

    def patterns(self, read: Callable[["Field"], T]) -> tuple[tuple[str, T], ...]:
        """Read a table of patterns, in the order of the file; `read` reads one of its values."""
        table = self.value or {}
        if not isinstance(table, dict) or len(table) > MAX_ENTRIES:
            self.refuse(f"is not a table of at most {MAX_ENTRIES} modules")
            return ()
        return tuple(
            (name, read(Field(value, f"{self.where}[{shortened(name)}]", self.found)))
            for name, value in table.items()
        )

    def plain(self, depth: int = 4) -> Any:  # noqa: ANN401
        """Read any JSON value of little depth; its texts may have control characters."""
        value = self.value
        if value is None or isinstance(value, bool | str) or number(value) is not None:
            return value
        if depth and isinstance(value, list):
            return [Field(item, self.where, self.found).plain(depth - 1) for item in value]
        if depth and isinstance(value, dict):
            items = {key: Field(item, self.where, self.found) for key, item in value.items()}
            return {key: item.plain(depth - 1) for key, item in items.items()}
        self.refuse("is nested too deeply, or holds a number that is too large")
        return None


def fields_of(config: Mapping[str, Any], found: Findings) -> Callable[..., Field]:
    """A function that takes the name of a field, and a default, and returns the field."""

    def field(key: str, default: object = None, *, where: str = "") -> Field:
        return Field(config.get(key, default), where or key, found)

    return field


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
        found.warn(
            "base_local_path",
            f"it names its base by a path, {shortened(name)}; only its shapes show whether it fits",
        )
    elif any(mark in lower for mark in ("4bit", "8bit", "-bnb", "-gptq", "-awq", "_nf4")):
        found.warn(
            "base_quantized",
            f"it was trained on a quantised copy, {shortened(name)}; on another copy it gives"
            " answers that are close, not equal",
        )
    return name


def number(value: object) -> float | None:
    """Return a finite number of ordinary size, else None; `true` and "8" are not numbers."""
    if isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e300:
        return float(value)
    return None


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


def is_active(value: object) -> bool:
    """Return whether a field is set: not null, false, zero or empty."""
    return value not in (None, False, "", 0) and value not in ([], {})


def unlike(value: object) -> str:
    """What is wrong with a value that looks like the number that is needed."""
    return " without quotes" if isinstance(value, str) else ""


def _are_names(value: object, most: int) -> TypeGuard[list[str]]:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(isinstance(name, str) and len(name) <= MAX_NAME for name in value)
    )
