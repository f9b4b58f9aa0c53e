"""The section `publish` of a recipe: where its model is published, and on what terms."""

from __future__ import annotations

from pydantic import field_validator

from meteora.artifacts import REPO_ID
from pipelines.recipe.benchmark import Section


class PublishSection(Section):
    """Where the finished model is published. Without this section it is not."""

    repo: str
    """`owner/name` on the Hub; created if missing."""
    private: bool = True
    """Whether only its owner sees it."""
    tag: str = ""
    """A tag for the commit. Default: a hash of the content."""
    allow_licences: tuple[str, ...] = ()
    """Licences that would stop the publication, and are allowed; `none`: adapters without one."""

    @field_validator("repo")
    @classmethod
    def _repo_is_owner_and_name(cls, value: str) -> str:
        if not REPO_ID.fullmatch(value) or ".." in value:
            raise ValueError(f"{value!r} is not owner/name")
        return value
