"""The facts that the store keeps beside the model's own nouns: verdicts, runs, failures."""

import math
from dataclasses import dataclass, field

from meteora.artifacts import ArtifactId, Noun, Reason

VERDICTS = ("accept", "warn", "refuse")
SKIPPED = ("skipped_late", "skipped_overlap")
"""Of a run that was due and did nothing: a later one was due too, or another one was going on."""
OUTCOMES = ("ok", "failed", "refused", "stopped", "killed", *SKIPPED)


def _one_of(value: str, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise ValueError(f"{value!r} is no {what}; it is one of {', '.join(allowed)}")


def _finite(seconds: float, what: str) -> None:
    if not math.isfinite(seconds):
        raise ValueError(f"{what} is {seconds}, which is no time")


@dataclass(frozen=True)
class AdapterVerdict(Noun):
    """What was decided about an adapter that was seen."""

    name: str
    """As the recipe calls it."""
    source: str
    """As the recipe names it, before a branch was resolved."""
    repo_id: str
    """`owner/name` on the Hub, or `path:<folder name>`."""
    revision: str
    """The commit; for a folder `sha256:` and the hash of its weights."""
    verdict: str
    """One of `VERDICTS`."""
    reasons: tuple[Reason, ...] = ()
    licence: str = ""
    author: str = ""
    subfolder: str = ""
    adapter_id: ArtifactId | None = None
    """None where its tensors were never understood."""
    base_models: tuple[str, ...] = ()
    """That its card names; unchecked, as licence and author are."""
    downloads: int | None = None
    """Of its repository in the 30 days before; None where the Hub did not say."""

    def __post_init__(self) -> None:
        _one_of(self.verdict, VERDICTS, "verdict")


@dataclass(frozen=True)
class RunStarted(Noun):
    run_id: str
    recipe_name: str
    recipe_sha256: str
    versions: dict[str, str] = field(default_factory=dict)
    """Of what the result depends on, such as {"torch": "2.13.0"}."""
    device: str = ""
    home: str = ""
    """Which of the homes that share a storage it runs in; empty where the home is alone."""


@dataclass(frozen=True)
class RunEnded(Noun):
    run_id: str
    outcome: str
    """One of `OUTCOMES`."""
    reason: str
    """A sentence; empty where all went well."""
    wall_seconds: float | None = None
    """None where nobody was left to measure it."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of each stage that ran, in their order."""

    def __post_init__(self) -> None:
        _one_of(self.outcome, OUTCOMES, "outcome")
        _finite(self.wall_seconds or 0.0, "wall_seconds")
        for stage, seconds in self.stage_seconds.items():
            _finite(seconds, stage)


@dataclass(frozen=True)
class Failure(Noun):
    """Something that was refused or went wrong, whether or not the run went on."""

    stage: str
    subject: str
    """An artifact id, an adapter's source, a task."""
    error: str
    """The class of the exception, or a code."""
    message: str
