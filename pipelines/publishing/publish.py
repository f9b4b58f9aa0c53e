"""Publish a checkpoint: check that it may be, put it on the Hub, load it from there, record it.

    licences ─▶ card for its place ─▶ one commit on a staging branch ─▶ downloaded and loaded anew,
    same logits ─▶ main ─▶ tag ─▶ record

What the Hub holds already is not sent again: new gates over the same experts are a small upload.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora.artifacts import REPO_ID, ArtifactId, MeteoraError, Publication
from meteora.base.sources import file_sha256, texts_sha256
from meteora.checkpoint.manifest import CARD, FILES, MANIFEST, read_manifest
from pipelines.admission.sources import hub_of
from pipelines.hub.bundle import pack
from pipelines.hub.client import Hub, saved_token
from pipelines.hub.errors import HubReferenceError
from pipelines.hub.upload import Repository
from pipelines.publishing import licences
from pipelines.publishing.signing import SIGNATURE
from pipelines.reports import card
from pipelines.reports.hub_metadata import EVAL_RESULTS
from pipelines.workspace.console import say
from pipelines.workspace.processes import (
    ChildDiedError,
    ChildError,
    ChildProcess,
    ChildTimeoutError,
)
from store.files import partial_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.hub.bundle import Parcel
    from pipelines.planning.plan import Plan
    from pipelines.recipe.publish import PublishSection
    from pipelines.workspace.context import RunContext
    from store.ledger import Ledger

RELOAD_WORKER = "pipelines.publishing.reload_worker"
RELOAD_SECONDS = 3600.0
"""For the download and two loadings of a model."""
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


class PublicationError(MeteoraError):
    """A checkpoint cannot be published, or is not the same where it was published."""


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint is to be published, and on what terms."""

    repo_id: str
    hub: Hub
    """With a token that may write there."""
    private: bool = True
    tag: str = ""
    """Of this publication; named by its content without it."""
    onto: str = ""
    """The commit that main is at, where somebody else put it there."""
    allow_licences: Sequence[str] = ()


@dataclass(frozen=True)
class Published:
    repo_id: str
    revision: str
    tag: str
    recorded: bool
    """Whether the ledger knows the model, and so its publication."""


def publish_plan(work: RunContext, plan: Plan) -> Published:
    """Publish what a recipe made, where it says; the last stage of a run."""
    section = work.recipe.publish
    if section is None:
        raise PublicationError(f"{work.name} has no `publish:` section; say where to")
    folder = work.checkpoint_folder(plan.router.id)
    return publish(
        work.ledger,
        folder,
        destination(work, section),
        work.run_id,
        base_folder=work.base_folder(plan.base),
    )


def destination(work: RunContext, section: PublishSection) -> Destination:
    """Where a recipe publishes; whoever asks to write sends the saved token."""
    hub = replace(hub_of(work.recipe, section.repo), token=saved_token())
    return Destination(
        section.repo,
        hub,
        private=section.private,
        tag=section.tag,
        allow_licences=section.allow_licences,
    )


def publish(
    ledger: Ledger,
    folder: Path,
    to: Destination,
    run_id: str,
    *,
    base_folder: Path | None = None,
    pauses: Sequence[float] | None = None,
) -> Published:
    """Put a checkpoint on the Hub, see that it is the same model there, and record it.

    Args:
        folder: The checkpoint; it stays as it is.
        base_folder: Where its base lies; without it the checkpoint's own reference is followed.
        pauses: Seconds before each further try of what may pass.

    Raises:
        LicenceError: An adapter's licence forbids it.
        HubConflictError: The repository holds something else, or moved meanwhile.
        PublicationError: What would be published names a secret or a folder of this machine; or
            what was published does not give the same logits. Nobody is shown it.
        HubError: The Hub does not answer, or says no.
    """
    if not REPO_ID.fullmatch(to.repo_id) or ".." in to.repo_id:
        raise HubReferenceError(f"{to.repo_id!r} is not owner/name, where it is to be published")
    manifest = read_manifest(folder)
    licences.refuse_forbidden(manifest, to.allow_licences)
    earlier = ledger.publications(to.repo_id)
    known = {publication.revision for publication in earlier}
    repository = Repository(to.repo_id, to.hub, **({} if pauses is None else {"pauses": pauses}))
    with tempfile.TemporaryDirectory(prefix="meteora-publish-") as scratch:
        parcel = _parcel(folder, to.repo_id, Path(scratch))
        _refuse_secrets(parcel, (to.hub.token or "", f"{Path.home()}/", str(ledger.home)))
        tag = to.tag or f"meteora-{parcel.digest[:12]}"

        def check(commit: str) -> None:
            if commit not in known:  # what is known was checked before it was recorded
                say(f"loading {to.repo_id} at {commit[:12]} anew")
                _check_reload(ledger.home, folder, parcel, to, commit, base_folder)

        revision = repository.publish(
            parcel, private=to.private, tag=tag, check=check, onto=to.onto, known=known
        )
    router_id = ArtifactId(manifest.router_id)
    recorded = bool(router_id) and ledger.weights_of(router_id) is not None
    if recorded:
        made = Publication(router_id, to.repo_id, revision, texts_sha256(folder), to.private)
        ledger.record_publication(made, run_id=run_id)
    return Published(to.repo_id, revision, tag, recorded)


def _parcel(folder: Path, repo_id: str, scratch: Path) -> Parcel:
    """The checkpoint's files, with a card that says under which name it is loaded.

    A signature goes along, and then the card, too, stays as it was signed.
    """
    names = (*FILES, SIGNATURE, EVAL_RESULTS)
    signed = (folder / SIGNATURE).is_file()
    for name in names:
        (scratch / name).parent.mkdir(exist_ok=True)
        if name == CARD and (folder / name).is_file() and not signed:
            text = card.fill_in_name(folder.joinpath(name).read_text(encoding="utf-8"), repo_id)
            (scratch / name).write_text(text, encoding="utf-8")
        elif (folder / name).is_file():
            (scratch / name).symlink_to((folder / name).resolve())
    return pack(scratch, names, MANIFEST)


def _refuse_secrets(parcel: Parcel, secrets: Sequence[str]) -> None:
    for name in parcel.files:
        if name.endswith(".safetensors"):
            continue
        text = (parcel.folder / name).read_text(encoding="utf-8")
        if SECRET.search(text) or any(secret and secret in text for secret in secrets):
            raise PublicationError(
                f"{name} holds a token or the path of a folder on this machine, which everybody"
                " would see; take it out of the recipe, run again and publish then"
            )


def _check_reload(
    home: Path,
    folder: Path,
    parcel: Parcel,
    to: Destination,
    commit: str,
    base_folder: Path | None,
) -> None:
    """Download a commit into an empty cache, and compare its bytes and its logits with ours.

    Args:
        home: Where the cache lies for the time, so that the store removes what a kill leaves.
    """
    with partial_file(home) as cache:
        cache.mkdir()
        request = {
            "folder": str(folder),
            "repo_id": to.repo_id,
            "revision": commit,
            "cache_dir": str(cache),
            "base_folder": None if base_folder is None else str(base_folder),
        }
        what = f"{to.repo_id} at {commit}"
        try:
            found = _reload(request, to.hub)
        except (ChildError, ChildDiedError, ChildTimeoutError) as error:
            raise PublicationError(f"{what} was uploaded and cannot be loaded: {error}") from None
        for path in Path(found["folder"]).iterdir():
            if path.name in parcel.files and file_sha256(path) != parcel.files[path.name].sha256:
                raise PublicationError(f"{what}: {path.name} came back with other bytes")
    if found["difference"] != 0:
        raise PublicationError(
            f"{what}: loaded anew, its logits differ from this model's by up to"
            f" {found['difference']:g}; nothing was made visible, publish again, and if it stays"
            " so, check this machine's memory and disk"
        )


def _reload(request: dict[str, str | None], hub: Hub) -> dict[str, Any]:
    """What `reload_worker.compare` returns, in a process that starts with nothing loaded."""
    environment = {
        "HF_ENDPOINT": hub.url(),
        "HF_TOKEN": hub.token or "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    with ChildProcess(RELOAD_WORKER, quiet=True, environment=environment) as worker:
        return worker.call(request, deadline_seconds=RELOAD_SECONDS)
