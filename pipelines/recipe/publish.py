"""Where a recipe publishes what it makes, and on what terms."""

from __future__ import annotations

from pydantic import field_validator

from meteora.artifacts import REPO_ID
from pipelines.recipe.benchmark import Section


class PublishSection(Section):
    """Where a finished model is published; without it, nowhere."""

    repo: str
    """`owner/name` on the Hub; it is made where there is none."""
    private: bool = True
    tag: str = ""
    """Of the publication; named by its content without it."""
    allow_licences: tuple[str, ...] = ()
    """Licences of adapters that are not to be in the way; `none` for those that state none."""

    @field_validator("repo")
    @classmethod
    def _repo_is_owner_and_name(cls, value: str) -> str:
        if not REPO_ID.fullmatch(value) or ".." in value:
            raise ValueError(f"{value!r} is not owner/name")
        return value
