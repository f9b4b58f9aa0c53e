"""Reasons against what strangers wrote, and how a message names what they wrote."""

import codecs
import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from meteora.artifacts import MeteoraError, Reason

MOST_OF_A_CODE = 3
"""Most reasons of one code, so that a file with a thousand faults gets a short message."""
MOST_NAMED = 8
"""Most experts or tasks that a message names; a model may have thousands."""
UNPACKERS = {
    b"\x1f\x8b": "gunzip -c",
    b"BZh": "bunzip2 -c",
    b"\xfd7zXZ": "unxz -c",
    b"\x28\xb5\x2f\xfd": "unzstd -c",
    b"PK\x03\x04": "unzip -p",
}
"""What unpacks a compressed file, by its first bytes."""
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # it begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""Encodings, by the first bytes of a text."""
MOST = 100
"""Most reasons in all: each new one is compared with these."""


class AdapterError(MeteoraError):
    """An adapter cannot be used as an expert; `reasons` says why."""

    def __init__(self, where: str, reasons: tuple[Reason, ...]) -> None:
        self.reasons = reasons
        listed = "; ".join(f"{reason.message} [{reason.code}]" for reason in reasons)
        super().__init__(f"{where}: {listed}")
        self._where = where

    def __reduce__(self) -> tuple[type, tuple[str, tuple[Reason, ...]]]:
        return type(self), (self._where, self.reasons)  # a worker process sends it to its parent


@dataclass
class Findings:
    """Refusals and warnings. Reading goes on after a refusal, to name all faults."""

    refusals: list[Reason] = field(default_factory=list)
    warnings: list[Reason] = field(default_factory=list)

    def refuse(self, code: str, message: str) -> None:
        _add(self.refusals, Reason(code, message))

    def warn(self, code: str, message: str) -> None:
        _add(self.warnings, Reason(code, message))


def _add(reasons: list[Reason], reason: Reason) -> None:
    if len(reasons) == MOST or reason in reasons:
        return
    if sum(r.code == reason.code for r in reasons) < MOST_OF_A_CODE:
        reasons.append(reason)


def listed(names: list[str] | tuple[str, ...], most: int = 3) -> str:
    """Return the first few names and how many more: `q_proj, k_proj (and 5 more)`."""
    shown = ", ".join(shortened(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} (and {len(names) - most} more)"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 row`, `2,000 rows`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def shortened(text: object, most: int = 80) -> str:
    """Return untrusted text in a form that is safe to show: printable, on one line, and short."""
    if isinstance(text, (list, dict)):
        return f"a {'list' if isinstance(text, list) else 'table'} of {len(text)}"
    plain = "".join(c if c.isprintable() else "�" for c in str(text)[: most + 1])
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def quoted(value: object) -> str:
    """Return an untrusted value of JSON as it is written there: a text in quotes, a number bare."""
    if isinstance(value, str):
        return repr(shortened(value))
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return shortened(value)


def inline_code(text: str) -> str:
    """Return untrusted text as inline code of Markdown, in which its markup has no effect."""
    return f"`{text.replace('`', '').replace('|', '')}`"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a clause for an error message that names the most similar known name, if any is."""
    folded = {one.casefold(): one for one in known}
    similar = get_close_matches(name.casefold(), folded, n=1)
    return f" (did you mean {folded[similar[0]]!r}?)" if similar else ""


def brief(error: Exception) -> str:
    """Return the first sentence of an error of another library, which can have a hundred lines.

    An error without a message is named by its class.
    """
    return shortened(" ".join(str(error).split()).partition(". ")[0], 300) or type(error).__name__


def causes(error: BaseException | None, *, hidden: bool = False) -> Iterator[BaseException]:
    """Yield an error and its causes, each once: they may go in a circle.

    Args:
        hidden: also those that `raise … from None` hides
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        told = error.__context__ if hidden or not error.__suppress_context__ else None
        error = error.__cause__ or told


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """Return a clause that says which line of a file is not UTF-8, and what to do."""
    bad_line, name = 0, shlex.quote(path.name)
    with path.open("rb") as file:
        start = file.read(8)
        for magic, unpack in UNPACKERS.items():
            if start.startswith(magic):
                return f"it is compressed; unpack it with `{unpack} {name} > new`"
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                line.decode(error.encoding)
            except UnicodeDecodeError:
                bad_line = number
                break
    marked = next((known for mark, known in MARKS.items() if start.startswith(mark)), None)
    what, encoding = (marked, marked.lower()) if marked else ("not UTF-8", "latin1")
    return (
        f"line {bad_line}: {what}; save the file as UTF-8, such as with"
        f" `iconv -f {encoding} -t utf-8 {name} > new`"
    )


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_PICTURES |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)  # bidi


def for_terminal(text: str) -> str:
    """Return text with pictures of its control characters, so that none moves the cursor.

    Those that turn the direction of what follows are replaced, too. Line breaks and tabs stay.
    """
    return text.translate(_PICTURES)
