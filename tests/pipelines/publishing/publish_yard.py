"""A place to publish to, and processes that publish and are killed at it."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meteora.adapters import reader
from meteora.artifacts import ArtifactId, BaseSpec, FusedSpec, RouterOptions, RouterSpec
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import (
    CARD,
    CONFIG,
    CONFIG_TEXT,
    EVAL_RESULTS,
    FILES,
    GATES,
    LINEAGE,
    MANIFEST,
    Manifest,
)
from store.ledger import Ledger
from tests.conftest import World
from tests.pipelines.hub.hub_server import Fault, HubServer
from tests.pipelines.hub.hub_uploads import FIRST, NAME, WRITES, GitRepo

CHANGES = {"repos", "put", *WRITES} - {"paths-info"}
"""Kinds of requests that change the Hub, or prepare it."""


@dataclass
class Yard:
    """A Hub, two checkpoints for one place on it, and processes that publish them."""

    server: HubServer
    process: subprocess.Popen[str]
    folder: Path
    base: Path
    routers: dict[str, ArtifactId]
    """Of the checkpoints `old` and `new`."""
    start: Path = Path()
    """The home at first."""
    held: GitRepo | None = None
    """What the Hub holds at first."""

    @property
    def repo(self) -> GitRepo:
        repo = self.server.repos[NAME]
        assert isinstance(repo, GitRepo)
        return repo

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def begin(self, held: GitRepo | None, start: Path) -> None:
        """Have the Hub and the home as they were."""
        self.held, self.start = held, start
        self.server.repos = {} if held is None else {NAME: copy.deepcopy(held)}
        self.server.requests.clear()
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(start, self.home)

    def put(
        self,
        which: str,
        *,
        strike: int = 0,
        of: Collection[str] = CHANGES,
        applied: bool = False,
        die: str = "",
    ) -> str | None:
        """Publish a checkpoint, and tell what it was killed at; None where it was not.

        Args:
            strike: The request at which it is killed, counted over the kinds in `of`; 0: none
            applied: Whether what it asks for is done, though it never hears of it.
            die: `before` or `after` the publication is recorded.
        """
        publisher: Future[int] = Future()
        fault = Fault(
            times=1,
            spared=strike - 1,
            applied=applied,
            at_last=lambda: os.kill(publisher.result(), signal.SIGKILL),
        )
        self.server.faults = dict.fromkeys(of, fault) if strike else {}
        places = {"home": self.home, "folder": self.folder / which, "base": self.base}
        asked = {name: str(place) for name, place in places.items()} | {"repo": NAME, "die": die}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        publisher.set_result(int(self.process.stdout.readline()))
        ended = int(self.process.stdout.readline())
        killed_at = fault.fell_on or die
        assert ended == (-signal.SIGKILL if killed_at else 0)
        return killed_at or None

    def content(self, which: str) -> dict[str, bytes]:
        """What the Hub shows of a checkpoint."""
        found = {name: self.folder / which / name for name in (*FILES, EVAL_RESULTS)}
        return FIRST | {name: path.read_bytes() for name, path in found.items() if path.exists()}

    def recorded(self) -> list[tuple[Any, ...]]:
        """Router and commit of each publication, latest first."""
        ledger = Ledger(self.home)
        ledger.ingest()
        return ledger.query("SELECT artifact_id, revision FROM publications").rows


def remember(ledger: Ledger, world: World) -> dict[str, ArtifactId]:
    """Record two routers over the world's experts, with all that they are made of."""
    base = BaseSpec("tiny/base", "a" * 40)
    experts = {name: reader.read(folder).spec for name, folder in world.adapters.items()}
    fused = FusedSpec(base.id, tuple(experts), tuple(spec.id for spec in experts.values()))
    old = RouterSpec(fused.id, "uniform", 1, 1.0)
    new = RouterSpec(fused.id, "gate", 1, 1.0, "calibrate", "e" * 64)
    for spec in (base, *experts.values(), fused, old, new):
        ledger.record_artifact(spec, weights_sha256=getattr(spec, "weights_sha256", ""), run_id="r")
    ledger.ingest()
    return {"old": old.id, "new": new.id}


def write(folder: Path, which: str, world: World, router_id: ArtifactId) -> None:
    """A checkpoint; the new one has gates, another card, and no results for leaderboards."""
    shutil.copytree(world.checkpoint, folder)
    manifest = dataclasses.replace(world.manifest, router_id=router_id)
    if which == "new":
        manifest = with_gates(folder, manifest)
    else:
        (folder / EVAL_RESULTS).parent.mkdir()
        (folder / EVAL_RESULTS).write_text("- {dataset: {id: a/b, task_id: c}, value: 1.0}\n")
    (folder / MANIFEST).write_text(manifest.to_json())
    (folder / CONFIG).write_text(CONFIG_TEXT)
    (folder / CARD).write_text(f"---\nlicense: mit\n---\n# The {which} model\n")
    (folder / LINEAGE).write_text("{}\n")


def with_gates(folder: Path, manifest: Manifest) -> Manifest:
    """Write random gates of the experts, and return the manifest of a router with gates."""
    own = {
        path: (torch.randn(len(manifest.experts), module.in_features), torch.zeros(4))
        for path, module in manifest.modules.items()
    }
    tensors.write_gates(folder / GATES, tensors.Gates(own))
    return dataclasses.replace(manifest, router=RouterOptions("gate", 1, 1.0))


def environment(server: HubServer) -> dict[str, str]:
    return {
        "HF_ENDPOINT": server.endpoint,
        "HF_TOKEN": "writer",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
