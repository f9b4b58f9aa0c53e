"""The section `publish` of a recipe: the repository of its model, and the allowed licences."""

import re

from pydantic import field_validator

from meteora.artifacts import REPO_ID
from pipelines.recipe.benchmark import Section

NOT_IN_TAGS = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{")
MAIN = "main"
STAGING = "meteora-staging-"
"""The beginning of the names of our own branches. A branch with such a name may be removed."""


def is_tag(name: str) -> bool:
    """Whether git allows a name for a tag, and no branch of a publication has it."""
    if name == MAIN or name.startswith(STAGING):
        return False
    parts = name.split("/")
    sound = all(
        part and part[0] not in ".-" and not part.endswith((".", ".lock")) for part in parts
    )
    return sound and NOT_IN_TAGS.search(name) is None


class PublishSection(Section):
    """The repository for the finished model. Without this section it is not published."""

    repo: str
    """`owner/name` on the Hub; created if missing."""
    private: bool = True
    """Whether only its owner sees it."""
    tag: str = ""
    """A tag for one model: if another model has it on the Hub, nothing is published. Default: a
    hash of the content, which differs between models."""
    allow_licences: tuple[str, ...] = ()
    """Licences to allow that otherwise stop a publication; `none`: adapters without a licence."""

    @field_validator("repo")
    @classmethod
    def _repo_is_owner_and_name(cls, value: str) -> str:
        if not REPO_ID.fullmatch(value):
            raise ValueError(f"{value!r} is not owner/name")
        return value

    @field_validator("tag")
    @classmethod
    def _tag_is_one(cls, value: str) -> str:
        if value and not is_tag(value):
            raise ValueError(
                f"{value!r} is no name of a tag, or is a branch's; letters, digits, '.', '_' and"
                " '-' may be in one"
            )
        return value
