"""The context of a run: the ledger, the recipe and its folder, and the run's id."""

import errno
import hashlib
import secrets
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from meteora.artifacts import ArtifactId, BaseSpec, canonical_sha256
from meteora.base.sources import PATH, path_from
from pipelines.recipe.recipe import Recipe, folder_of, locate, read_recipe, shipped
from pipelines.workspace.bases import base_at
from store.files import sync
from store.ledger import Ledger


@dataclass(frozen=True)
class RunContext:
    """The objects that every stage of a run needs."""

    ledger: Ledger
    recipe: Recipe
    path: Path
    """The recipe's file."""
    run_id: str
    recipe_sha256: str = ""
    """The hash of the recipe's text when it was read; empty if no file was read."""

    @classmethod
    def open(cls, recipe: str, home: Path) -> Self:
        """Read a recipe, by its path or as a shipped name; nothing is written yet."""
        path = locate(recipe)
        text = read_recipe(path)
        sha256 = hashlib.sha256(text).hexdigest()
        return cls(Ledger(home), Recipe.parse(text, path), path, new_run_id(), sha256)

    @property
    def name(self) -> str:
        """The recipe's name, by `name_of`."""
        return name_of(self.path)

    @property
    def key(self) -> str:
        """The name, with a hash of the path unless it is a shipped recipe; unique in a home."""
        if shipped().get(self.name) == self.path:
            return self.name
        return f"{self.name}-{canonical_sha256(str(_place(self.path)))[:8]}"

    @property
    def folder(self) -> Path:
        """The folder that paths in the recipe are relative to, by `folder_of`."""
        return folder_of(self.path)

    @property
    def home(self) -> Path:
        return self.ledger.home

    @property
    def adapters_folder(self) -> Path:
        """The downloaded adapters, by repository and commit."""
        return self.home / "adapters"

    @contextmanager
    def scratch(self) -> Generator[Path]:
        """A temporary folder on the store's disk, so files can move to the store by a rename."""
        parent = self.home / "runs" / self.run_id
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            yield Path(folder)

    def base_folder(self, spec: BaseSpec) -> Path:
        """The base, as a folder that transformers loads."""
        source = self.recipe.base
        if source.startswith(PATH):
            return path_from(self.folder, source.removeprefix(PATH))
        return base_at(self.home, spec.stored.id)

    def checkpoint_folder(self, router_id: ArtifactId) -> Path:
        """The folder of the checkpoint with this router; it may not exist yet."""
        return checkpoint_at(self.home, router_id)

    def training_folder(self, router_id: ArtifactId) -> Path:
        """The state of an unfinished fit of these gates; the next run continues from it."""
        return self.home / "training" / router_id.partition(":")[2][:16]

    def answers_file(self, sha256: str) -> Path:
        """The answers to an unfinished task, by the hash of everything that they depend on.

        The next run continues from them.
        """
        return self.home / "answers" / f"{sha256[:32]}.jsonl"

    def holds(self, artifact_id: ArtifactId) -> bool:
        """Whether an artifact is recorded, and all of its bytes are still in the store."""
        sha256s = self.ledger.blobs_of(artifact_id)
        return bool(sha256s) and all(sha256 in self.ledger.blobs for sha256 in sha256s)


def checkpoint_at(home: Path, router_id: ArtifactId) -> Path:
    """The folder of the checkpoint with this router in a home."""
    return home / "checkpoints" / router_id.partition(":")[2][:16]


def put_in_place(made: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`, in place of any older one.

    Its bytes are written to the disk first: a folder with this name counts as complete. It is on
    the same disk, in a temporary folder, to which the older folder moves.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in (*made.rglob("*"), made):
        sync(path)
    while True:  # no sooner: whoever is killed while it syncs leaves the older one
        with suppress(FileNotFoundError):
            folder.rename(made.with_name(f"before-{secrets.token_hex(4)}"))
        try:
            made.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise  # else another process has just put its own there
        else:
            break
    sync(folder.parent)


def new_run_id() -> str:
    """A new id: it sorts by time, and no other run has it."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"


def name_of(recipe: Path) -> str:
    """A recipe's name: that of its file, or of its folder if the file is `recipe.yaml`."""
    return (_place(recipe).parent.name or recipe.stem) if recipe.stem == "recipe" else recipe.stem


def _place(recipe: Path) -> Path:
    """A recipe's absolute path; only its folder is resolved.

    So a link to a recipe is a recipe of its own, and its paths are relative to the link's folder.
    """
    return recipe.parent.resolve() / recipe.name
