"""Base classes of all nouns: JSON and back, and for specs an id that is a hash of the fields."""

import hashlib
import json
import re
from dataclasses import MISSING, asdict, fields, is_dataclass
from functools import cache, cached_property
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, NewType, Self, get_type_hints

ArtifactId = NewType("ArtifactId", str)
"""`<kind>:<64 hex digits>`. People are shown the first 12 digits; all are stored."""

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A Git commit."""
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9_\-]|\.(?!\.)){0,95}"
REPO_ID = re.compile(rf"{_PART}/{_PART}")
"""`owner/name`, a repository on the Hub; without `..`, which a path would follow."""
SHA256 = re.compile(r"[0-9a-f]{64}")
"""A SHA-256 in lower-case hex digits."""


class MeteoraError(Exception):
    """The base of all our errors. A message says what, where, and what to do."""


def canonical_json(value: object) -> str:
    """The one JSON text of a value: keys sorted, no spaces, characters beyond ASCII as they are.

    Raises:
        ValueError: a number is NaN or infinite.
        TypeError: a value is not JSON.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def canonical_sha256(value: object) -> str:
    """The SHA-256 of a value's canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short(artifact_id: str) -> str:
    """An id with 12 digits, for people."""
    kind, _, digest = artifact_id.partition(":")
    return f"{kind}:{digest[:12]}"


PLAIN: dict[Any, tuple[type, ...]] = {
    str: (str,), int: (int,), float: (int, float), bool: (bool,), ArtifactId: (str,),
}  # fmt: skip
"""What JSON may hold for a field of a plain type: people and other programs write 1 for 1.0."""


class Noun:
    """A frozen dataclass that JSON can store: writing and reading it gives an equal one."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, nested nouns as dicts."""
        return asdict(self)  # ty: ignore[invalid-argument-type]

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Self:
        """Read what `to_dict` returned, also that of an older version with fewer fields.

        Raises:
            KeyError: a field is missing that has no default.
            TypeError: the body, or the value of a field, has another type.
        """
        return cls(
            **{
                name: _revive(body[name], hint)
                for name, hint, is_needed in _fields_of(cls)
                if is_needed or name in body
            }
        )


@cache
def _fields_of(cls: type) -> tuple[tuple[str, Any, bool], ...]:
    """Name and type of each field, and whether it has no default.

    Kept, since it is slow, and a checkpoint may have 100,000 modules of one class.
    """
    hints = get_type_hints(cls)
    own = fields(cls)  # ty: ignore[invalid-argument-type]
    return tuple((f.name, hints[f.name], f.default is MISSING) for f in own)


def _revive(value: Any, hint: Any) -> Any:  # noqa: ANN401  (JSON is what it is)
    if hint in PLAIN:
        return _checked(value, PLAIN[hint])
    if isinstance(hint, type) and is_dataclass(hint) and issubclass(hint, Noun):
        return hint.from_dict(value)
    if getattr(hint, "__origin__", None) is tuple:
        return tuple(_revive(item, hint.__args__[0]) for item in _checked(value, (list, tuple)))
    if isinstance(hint, UnionType) and value is not None:
        return _revive(value, hint.__args__[0])  # the noun of `Noun | None`
    return value


def _checked(value: Any, types: tuple[type, ...]) -> Any:  # noqa: ANN401
    if isinstance(value, types):
        return value
    raise TypeError(f"a {type(value).__name__}, where a {types[-1].__name__} is needed")


class Spec(Noun):
    """Describes a thing to make or measure. Specs with equal ids are equal.

    Equal specs have equal ids but for numbers: 1 and 1.0 are equal, and their JSON is not.
    """

    kind: ClassVar[str]
    """The first part of the id."""
    version: ClassVar[int] = 1
    """Part of the hash. Raise it when the same fields give other bytes than before."""
    made_of: ClassVar[tuple[str, ...]] = ()
    """The fields that hold the ids of the parents."""

    @cached_property
    def id(self) -> ArtifactId:
        """The kind, and a hash of the version and of every field that is not at its default.

        So a new field with a default changes no existing id. It is computed once: an adapter's
        spec has hundreds of modules, and its id is compared with that of every other adapter.
        """
        at_default = {f.name for f in fields(self) if getattr(self, f.name) == f.default}  # ty: ignore[invalid-argument-type]
        hashed = {name: value for name, value in self.to_dict().items() if name not in at_default}
        return ArtifactId(f"{self.kind}:{canonical_sha256({'version': self.version, **hashed})}")

    @property
    def parents(self) -> tuple[ArtifactId, ...]:
        """The ids that this spec depends on, in order."""
        return tuple(getattr(self, name) for name in self.made_of)
