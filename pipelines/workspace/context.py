"""Where a run works: the store, the recipe and its folder, and the run's own name."""

from __future__ import annotations

import secrets
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

from meteora.artifacts import canonical_sha256
from meteora.base.sources import PATH, file_sha256
from pipelines.recipe.recipe import SHIPPED, Recipe, locate, shipped
from store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Generator

    from meteora.artifacts import ArtifactId, BaseSpec


@dataclass(frozen=True)
class RunContext:
    ledger: Ledger
    recipe: Recipe
    path: Path
    """Of the recipe."""
    run_id: str

    @classmethod
    def open(cls, recipe: str, home: Path) -> Self:
        """Read a recipe, by its path or as a shipped name; nothing is written yet."""
        path = locate(recipe)
        return cls(Ledger(home), Recipe.load(path), path, new_run_id())

    @property
    def name(self) -> str:
        """As people call the recipe: its file's name, or its folder's where that says nothing."""
        return self.path.parent.name if self.path.stem == "recipe" else self.path.stem

    @property
    def key(self) -> str:
        """The name, told apart from recipes of the same name in other folders."""
        if shipped().get(self.name) == self.path:
            return self.name
        return f"{self.name}-{canonical_sha256(str(self.path.resolve()))[:8]}"

    @property
    def folder(self) -> Path:
        """What paths in the recipe are relative to.

        Its own folder; and where a shipped recipe leaves adapters and rows to the user, the folder
        that the program is run in.
        """
        return Path.cwd() if self.path.parent == SHIPPED else self.path.parent

    @property
    def recipe_sha256(self) -> str:
        return file_sha256(self.path)

    @property
    def home(self) -> Path:
        return self.ledger.home

    @property
    def adapters_folder(self) -> Path:
        """Where downloaded adapters lie, by repository and commit."""
        return self.home / "adapters"

    @contextmanager
    def scratch(self) -> Generator[Path]:
        """A folder on the store's own disk: what is made there moves in by a rename."""
        parent = self.home / "runs" / self.run_id
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)

    def base_folder(self, spec: BaseSpec) -> Path:
        """Where the base lies, as a folder that transformers loads."""
        source = self.recipe.base
        if source.startswith(PATH):
            return self.folder / source.removeprefix(PATH)
        return self.home / "bases" / spec.id.partition(":")[2]

    def checkpoint_folder(self, router_id: ArtifactId) -> Path:
        """Where the checkpoint with this router lies, once it is written."""
        return checkpoint_at(self.home, router_id)

    def training_folder(self, router_id: ArtifactId) -> Path:
        """Where the training of these gates leaves its state, for whichever run goes on with it."""
        return self.home / "training" / router_id.partition(":")[2][:16]

    def answers_file(self, asking: str) -> Path:
        """Where the answers of an asking are kept until it is finished, for whichever run ends it.

        Args:
            asking: the hash of everything that decides what is answered
        """
        return self.home / "answers" / f"{asking[:32]}.jsonl"

    def holds(self, artifact_id: ArtifactId) -> bool:
        """Whether an artifact was made and its bytes still lie in the store."""
        sha256 = self.ledger.weights_of(artifact_id)
        return sha256 is not None and sha256 in self.ledger.blobs


def checkpoint_at(home: Path, router_id: ArtifactId) -> Path:
    """Where a home keeps the checkpoint with this router."""
    return home / "checkpoints" / router_id.partition(":")[2][:16]


def put_in_place(made: Path, folder: Path) -> None:
    """Give a finished folder its name; what had it before goes, once this one is whole.

    Args:
        made: on the same disk, in a folder of its own that is removed afterwards
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        folder.rename(made.with_name("before"))
    made.rename(folder)


def new_run_id() -> str:
    """A name that sorts by time and never comes twice."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
