"""Stages on tiny models, most of whose time would go into what is counted for large ones."""

from pathlib import Path

import pytest

from pipelines.evaluation import routing_stats
from tests.pipelines.cli.command_line import done


@pytest.fixture(autouse=True)
def _few_composites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_stats, "COMPOSITES", 6)


def dropped_and_added(checkpoint: Path, base: Path, recipe_folder: Path, home: Path) -> Path:
    """The checkpoint after an expert was dropped, and added again from the recipe's files."""
    dropped = done("drop", checkpoint, "attention", "--home", home)
    source = f"jsonl:{recipe_folder / 'attention.train.jsonl'}"
    added = done(
        "add", dropped.stdout.strip(), "attention", recipe_folder / "attention", source,
        "--base", base, "--home", home,
    )  # fmt: skip
    return Path(added.stdout.strip())
