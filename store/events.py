"""Facts about runs: verdicts on adapters, starts and ends of runs, failures."""

import re
from dataclasses import dataclass, field
from typing import Literal

from meteora.artifacts import ArtifactId, Noun, Reason

RUN_ID = re.compile(r"\w[\w.-]*")
"""An id is the name of a folder, which is removed when the run is over."""
Judgement = Literal["accept", "warn", "refuse"]
Outcome = Literal["ok", "failed", "refused", "stopped", "killed", "skipped_late", "skipped_overlap"]
"""A scheduled run is skipped if a later run was due too, or if one was running."""


@dataclass(frozen=True)
class AdapterVerdict(Noun):
    """The verdict on an adapter, at one revision."""

    name: str
    """The expert's name in the recipe."""
    source: str
    """The adapter as the recipe names it, with the branch if there is one."""
    repo_id: str
    """`owner/name` on the Hub, or `path:<folder name>`."""
    revision: str
    """The commit; for a folder `sha256:` and the hash of its weights; empty if the Hub has none."""
    verdict: Judgement
    reasons: tuple[Reason, ...] = ()
    licence: str = ""
    author: str = ""
    subfolder: str = ""
    adapter_id: ArtifactId | None = None
    """None if its tensors could not be read."""
    base_models: tuple[str, ...] = ()
    """The bases that its card names; unchecked, like licence and author."""
    downloads: int | None = None
    """Downloads of its repository in the last 30 days; None if the Hub does not say."""


@dataclass(frozen=True)
class RunStarted(Noun):
    run_id: str
    recipe_name: str
    recipe_sha256: str
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that the result depends on, such as {"torch": "2.13.0"}."""
    device: str = ""
    home: str = ""
    """The name of the home among those that share a storage; empty without sharing."""

    def __post_init__(self) -> None:
        if not RUN_ID.fullmatch(self.run_id):
            raise ValueError(f"{self.run_id!r} is no id of a run")


@dataclass(frozen=True)
class RunEnded(Noun):
    run_id: str
    outcome: Outcome
    reason: str
    """A sentence; empty for `ok`."""
    wall_seconds: float | None = None
    """None if the run was killed."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage that ran, in order."""


@dataclass(frozen=True)
class Failure(Noun):
    """A refusal or an error, whether or not the run went on."""

    stage: str
    subject: str
    """An artifact id, an adapter's source, or a task."""
    error: str
    """The class of the exception, or a code."""
    message: str
