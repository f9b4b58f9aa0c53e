"""What makes a noun a noun: JSON and back, and an id that is the hash of what is asked."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import MISSING, asdict, fields, is_dataclass
from types import UnionType
from typing import Any, ClassVar, NewType, Self, get_type_hints

ArtifactId = NewType("ArtifactId", str)
"""`<kind>:<64 hex digits>`; show the first 12 digits, keep all of them."""

COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,95}"
REPO_ID = re.compile(rf"{_PART}/{_PART}")
"""`owner/name`, as the Hub knows repositories."""
SHA256 = re.compile(r"[0-9a-f]{64}")


class MeteoraError(Exception):
    """Something that was asked for cannot be done; the message says what, where and what to do."""


def canonical_json(value: object) -> str:
    """One text for one value: keys sorted, no spaces, UTF-8 as it is, NaN and infinity refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def canonical_sha256(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def short(artifact_id: str) -> str:
    """An id as people read it: the kind and 12 digits."""
    kind, _, digest = artifact_id.partition(":")
    return f"{kind}:{digest[:12]}"


class Noun:
    """A frozen dataclass that goes to JSON and comes back equal."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)  # ty: ignore[invalid-argument-type]

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> Self:
        """The noun that `to_dict` described, by this version or by one that knew fewer fields.

        Raises:
            KeyError: a field without a default is missing.
        """
        hints = get_type_hints(cls)
        return cls(
            **{
                f.name: _revive(body[f.name], hints[f.name])
                for f in fields(cls)  # ty: ignore[invalid-argument-type]
                if f.name in body or f.default is MISSING
            }
        )


def _revive(value: Any, hint: Any) -> Any:  # noqa: ANN401  (JSON is what it is)
    if isinstance(hint, type) and is_dataclass(hint) and issubclass(hint, Noun):
        return hint.from_dict(value)
    if getattr(hint, "__origin__", None) is tuple:
        return tuple(_revive(item, hint.__args__[0]) for item in value)
    if isinstance(hint, UnionType) and value is not None:
        return _revive(value, hint.__args__[0])  # the noun of `Noun | None`
    return value


class Spec(Noun):
    """What is asked for. Two equal specs have equal ids, and two different specs different ones."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    """Part of the id. Bump it where the same asking now means other bytes."""

    @property
    def id(self) -> ArtifactId:
        """The kind, and the hash of the version and of every field that is not at its default.

        So a field that is added with a default leaves the ids of all that was made before.
        """
        at_default = {f.name for f in fields(self) if getattr(self, f.name) == f.default}  # ty: ignore[invalid-argument-type]
        asked = {name: value for name, value in self.to_dict().items() if name not in at_default}
        return ArtifactId(f"{self.kind}:{canonical_sha256({'version': self.version, **asked})}")

    @property
    def parents(self) -> tuple[ArtifactId, ...]:
        """The artifacts that this one is built from, in the order that matters to it."""
        return ()
