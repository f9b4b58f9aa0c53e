"""The fields of a stranger's config, each read to its type or refused with its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from meteora.untrusted.findings import shortened

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from meteora.untrusted.findings import Findings

T = TypeVar("T")

MAX_RANK = 4_096
MAX_ALPHA = 1e6
MAX_ENTRIES = 20_000
MAX_NAMES = 64
MAX_TEXT = 2_000


def base_model(name: object, found: Findings) -> str:
    if name in (None, ""):
        found.warn("base_unnamed", "it names no base; its shapes must tell whether it fits")
        return ""
    if not isinstance(name, str) or len(name) > 512 or not name.isprintable():
        found.warn("base_unreadable", "the base it names is not a name; it is left out")
        return ""
    lower = name.lower()
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or ":" in name:
        found.warn("base_local_path", f"its base is a path on another machine: {shortened(name)}")
    elif any(mark in lower for mark in ("4bit", "8bit", "-bnb", "-gptq", "-awq", "_nf4")):
        found.warn(
            "base_quantized",
            f"it was trained on a quantised copy, {shortened(name)}; on another copy it is close"
            " to what was trained, not equal",
        )
    return name


def targets(config: Mapping[str, Any], key: str, found: Findings) -> tuple[str, ...] | str:
    """Modules by their names or by a pattern; empty where the field is not set."""
    value = config.get(key)
    if value is None:
        return ()
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            found.refuse("pattern", f"{key} is a pattern of {len(value)} characters; {MAX_TEXT} do")
            return ()
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        found.refuse(key, f"{key} is neither a list of names nor a pattern")
        return ()
    return tuple(sorted(set(value)))


def names(config: Mapping[str, Any], key: str, found: Findings) -> tuple[str, ...]:
    value = config.get(key) or []
    if (
        not isinstance(value, list)
        or len(value) > MAX_NAMES
        or not all(isinstance(name, str) for name in value)
    ):
        found.refuse(key, f"{key} is not a list of at most {MAX_NAMES} names")
        return ()
    return tuple(sorted(set(value)))


def layers(value: object) -> tuple[int, ...]:
    layers = value if isinstance(value, list) else [value]
    return tuple(sorted({layer for layer in layers if type(layer) is int}))


def bias(config: Mapping[str, Any], found: Findings) -> str:
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        found.refuse("bias", f"bias is {shortened(bias)!r}; none, all and lora_only are possible")
        return "none"
    return bias


def text(config: Mapping[str, Any], key: str, found: Findings) -> str:
    value = config.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        found.refuse(key, f"{key} is not a short text")
        return ""
    return value


def flag(config: Mapping[str, Any], key: str, found: Findings) -> bool:
    value = config.get(key)
    if value is not None and type(value) is not bool:
        found.refuse(key, f"{key} is {shortened(value)!r}, neither true nor false")
    return value is True


def pattern_table(
    config: Mapping[str, Any], key: str, read: Callable[[object, str, Findings], T], found: Findings
) -> tuple[tuple[str, T], ...]:
    table = config.get(key) or {}
    if not isinstance(table, dict) or len(table) > MAX_ENTRIES:
        found.refuse(key, f"{key} is not a table of at most {MAX_ENTRIES} modules")
        return ()
    return tuple((name, read(v, f"{key}[{shortened(name)}]", found)) for name, v in table.items())


def rank(value: object, where: str, found: Findings) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        found.refuse("rank", f"{where} is {shortened(value)!r}; it must be 1 to {MAX_RANK}")
        return 0
    return value


def alpha(value: object, where: str, found: Findings) -> float:
    read = number(value)
    if read is None or not 0 < read <= MAX_ALPHA:
        found.refuse(
            "alpha", f"{where} is {shortened(value)!r}; it must be a number above 0, at most 10^6"
        )
        return 0.0
    return read


def number(value: object) -> float | None:
    """A finite number of ordinary size; true is none, and neither is "8"."""
    if isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e300:
        return float(value)
    return None


def is_active(value: object) -> bool:
    return value not in (None, False, "", 0) and value not in ([], {})
