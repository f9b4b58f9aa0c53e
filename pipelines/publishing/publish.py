"""Publish a checkpoint: check licences, upload, load it from the Hub, compare, record.

    licences ─▶ card with the repository's name ─▶ one commit on a staging branch ─▶ downloaded and
    loaded, same logits ─▶ main ─▶ tag ─▶ record

Files that the Hub has already are not sent again: new gates for old experts are a small upload.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meteora.artifacts import REPO_ID, ArtifactId, MeteoraError, Publication, file_sha256
from meteora.base.sources import PATH, texts_sha256
from meteora.base.temporary_folder import temporary_folder
from meteora.checkpoint.manifest import (
    CARD,
    EVAL_RESULTS,
    FILES,
    SIGNATURE,
    read_manifest,
)
from meteora.untrusted.links import link_out
from pipelines.hub.bundle import Bundle, make_bundle
from pipelines.hub.errors import HubReferenceError
from pipelines.hub.upload import Repository, hub_to_publish
from pipelines.processes.child import ChildError, ChildProcess
from pipelines.publishing import licences
from pipelines.publishing.signing import is_signed
from pipelines.recipe.publish import is_tag
from pipelines.reports import card
from pipelines.workspace.bases import require_sound
from pipelines.workspace.console import say
from store.files import partial_file

if TYPE_CHECKING:
    from pipelines.admission.checkpoints import FoundCheckpoint
    from pipelines.hub.client import Hub
    from pipelines.planning.plan import Plan
    from pipelines.workspace.context import RunContext
    from store.ledger import Ledger

RELOAD_WORKER = "pipelines.publishing.reload_worker"
RELOAD_SECONDS = 3600.0
"""The deadline for the download, and for loading the model twice."""
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


class PublicationError(MeteoraError):
    """A checkpoint cannot be published, or differs from its copy on the Hub."""


@dataclass(frozen=True)
class Destination:
    """The repository to publish a checkpoint to, and the settings of the publication."""

    repo_id: str
    hub: Hub
    """With a token that may write to the repository."""
    private: bool = True
    tag: str = ""
    """The tag of this publication; if empty, one is made from its hash."""
    onto: str = ""
    """The commit of main that may be replaced, if another machine made it."""
    allow_licences: Sequence[str] = ()


def publish_plan(work: RunContext, plan: Plan) -> None:
    """Publish a recipe's checkpoint to the repository that it names; the last stage of a run."""
    from pipelines.admission.checkpoints import FoundCheckpoint  # noqa: PLC0415  (it loads torch)

    section = work.recipe.publish
    assert section is not None  # noqa: S101  (the caller checks it)
    require_sound(work.ledger, plan.base)
    to = Destination(
        section.repo,
        hub_to_publish(work.recipe, section.repo),
        private=section.private,
        tag=section.tag,
        allow_licences=section.allow_licences,
    )
    folder, base_folder = work.checkpoint_folder(plan.router.id), work.base_folder(plan.base)
    made, _ = publish(work.ledger, FoundCheckpoint(folder, base_folder), to, work.run_id)
    say(f"published as {made.repo_id}@{made.revision}")


def publish(
    ledger: Ledger, found: FoundCheckpoint, to: Destination, run_id: str
) -> tuple[Publication, bool]:
    """Upload a checkpoint, check that the Hub has the same model, and record the publication.

    Args:
        found: The checkpoint; it is not changed. Without a folder of its base, the base that the
            manifest names is compared.

    Returns:
        The publication, and whether it is recorded, which it is if the ledger has the router.

    Raises:
        LicenceError: An adapter's licence forbids it.
        HubConflictError: The repository has other contents, or main has moved.
        PublicationError: A file contains a secret or the path of a local folder; or the model on
            the Hub computes other logits, and then main does not show it.
        HubError: The Hub does not answer, or refuses.
    """
    if not REPO_ID.fullmatch(to.repo_id):
        raise HubReferenceError(f"{to.repo_id!r} is not owner/name, where it is to be published")
    if to.tag and not is_tag(to.tag):
        raise HubReferenceError(f"{to.tag!r} is not a valid tag, or is the name of a branch")
    folder = found.folder
    manifest = read_manifest(folder)
    if found.base_folder is None and manifest.base.repo_id.startswith(PATH):
        raise PublicationError(
            f"{to.repo_id}: the model is loaded again when it is published, and its base is a local"
            " folder; say where that lies with --base"
        )
    licences.refuse_forbidden(manifest, to.allow_licences)
    earlier = ledger.publications(to.repo_id)
    known = {publication.revision for publication in earlier}
    repository = Repository(to.repo_id, to.hub)
    with temporary_folder(Path(tempfile.gettempdir()), "meteora-publish-") as scratch:
        bundle = _bundle(folder, to.repo_id, scratch)
        paths = map(_path_pattern, (Path.home(), ledger.home))
        _refuse_secrets(bundle, (re.escape(to.hub.token or ""), *paths))
        tag = to.tag or f"meteora-{bundle.digest[:12]}"

        def check(commit: str) -> None:
            if commit not in known:  # a recorded commit was checked before
                say(f"loading {to.repo_id} at {commit[:12]} from the Hub")
                _check_reload(ledger.home, found, bundle, to, commit)

        revision = repository.publish(
            bundle, private=to.private, tag=tag, check=check, onto=to.onto, known=known
        )
    router_id = ArtifactId(manifest.router_id)
    made = Publication(router_id, to.repo_id, revision, texts_sha256(folder), to.private, tag)
    recorded = bool(router_id) and ledger.weights_of(router_id) is not None
    if recorded:
        ledger.record_publication(made, run_id=run_id)
    return made, recorded


def _bundle(folder: Path, repo_id: str, scratch: Path) -> Bundle:
    """The checkpoint's files, with the repository's name in the card.

    A signature is published, too; then the card must stay unchanged.
    """
    names = (*FILES, SIGNATURE, EVAL_RESULTS)
    signed = is_signed(folder)
    for name in names:
        _refuse_link(folder, name)
        (scratch / name).parent.mkdir(exist_ok=True)
        if name == CARD and (folder / name).is_file() and not signed:
            text = _text_of(folder / name)
            named = text.replace(card.NAME_PLACEHOLDER, repo_id)
            (scratch / name).write_text(named, encoding="utf-8")
        elif (folder / name).is_file():
            (scratch / name).symlink_to((folder / name).resolve())
    return make_bundle(scratch, names)


def _refuse_link(folder: Path, name: str) -> None:
    if target := link_out(folder, name):
        raise PublicationError(
            f"{name} is a link to {target}, which everybody could read then; if it"
            " belongs to the checkpoint, put the file itself there"
        )


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PublicationError(
            f"{path.name}: it is not a text in UTF-8, so it cannot be searched for secrets; mend"
            " it, or make the checkpoint again"
        ) from None


def _path_pattern(folder: Path) -> str:
    """A pattern of a folder and all in it; empty for `/`, which is a home in some containers."""
    whole = folder.absolute()
    if whole == whole.parent:
        return ""
    in_json = json.dumps(str(whole))[1:-1]
    return f"(?:{re.escape(str(whole))}|{re.escape(in_json)})" + r"(?![\w.-])"


def _refuse_secrets(bundle: Bundle, patterns: Sequence[str]) -> None:
    for name in bundle.files:
        if name.endswith(".safetensors"):
            continue
        text = _text_of(bundle.folder / name)
        if SECRET.search(text) or any(one and re.search(one, text) for one in patterns):
            raise PublicationError(
                f"{name} holds a token or the path of a folder on this machine, which everybody"
                " would see; take it out of the recipe, run again, and then publish"
            )


def _check_reload(
    home: Path, ours: FoundCheckpoint, bundle: Bundle, to: Destination, commit: str
) -> None:
    """Download a commit into an empty cache, and compare its bytes and its logits with ours.

    The cache is in the home, so the store removes the files of a killed process.
    """
    with partial_file(home) as cache:
        cache.mkdir()
        request = {
            "folder": str(ours.folder),
            "repo_id": to.repo_id,
            "revision": commit,
            "names": list(bundle.files),
            "cache_dir": str(cache),
            "base_folder": None if ours.base_folder is None else str(ours.base_folder),
            "download": ours.download,
            "device": ours.device,
            "dtype": ours.dtype,
        }
        what = f"{to.repo_id} at {commit}"
        try:
            found = _reload(request, to.hub)
        except ChildError as error:
            raise PublicationError(f"{what} was uploaded and cannot be loaded: {error}") from None
        for name, file in bundle.files.items():
            if file_sha256(Path(found["folder"], name)) != file.sha256:
                raise PublicationError(f"{what}: {name} came back with other bytes")
    if found["difference"] != 0:
        raise PublicationError(
            f"{what}: loaded anew, its logits differ from this model's by up to"
            f" {found['difference']:g}; main does not show it. Publish again, and if it stays"
            " so, check this machine's memory and disk"
        )


def _reload(request: dict[str, Any], hub: Hub) -> dict[str, Any]:
    """The result of `reload_worker.compare`, in a process that starts with nothing loaded."""
    environment = {
        "HF_ENDPOINT": hub.url(),
        "HF_TOKEN": hub.token or "",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # makes products on a GPU deterministic
    }
    with ChildProcess(RELOAD_WORKER, quiet=True, environment=environment) as worker:
        return worker.ask(request, deadline_seconds=RELOAD_SECONDS)
