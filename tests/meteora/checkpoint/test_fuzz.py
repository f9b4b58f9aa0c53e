"""For any change to a sound checkpoint: it loads, or there is one refusal of our own.

    pytest -m slow -n 0 tests/meteora/checkpoint/test_fuzz.py -o log_cli=true

does it a hundred thousand times, and prints the figures; `--basetemp=/dev/shm/fuzz` keeps its many
small files off the disk, where they take longer than the work.
"""

import itertools
import json
import logging
import random
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import meteora
from meteora.artifacts import COMMIT, MeteoraError
from meteora.base.sources import SourceError
from meteora.checkpoint import edit, export, gguf_export, resolve
from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST, STATISTICS, Manifest
from meteora.checkpoint.tensors import MAX_TOKEN, read_gates
from meteora.fitting import add_expert
from meteora.fitting.statistics import PointStatistics, read_statistics, write_statistics
from tests.clock import little_work, no_stall
from tests.conftest import World
from tests.meteora.checkpoint import mutator
from tests.meteora.checkpoint.checkpoint_maker import gated, read_all

LONGEST = 3_000
"""Characters of a message."""
MOST_MEMORY = 1 << 20
"""kB that all together may take beyond what the first ones took. Of every load the libraries keep
25 kB, and a fifth of them loads."""
log = logging.getLogger(__name__)


@dataclass
class Sound:
    """The files of a sound checkpoint, where changed ones are written, and its base."""

    files: dict[str, bytes]
    folder: Path
    base: Path


@pytest.fixture(scope="module")
def sound(world: World, tmp_path_factory: pytest.TempPathFactory) -> Sound:
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoint"
    manifest = gated(world, folder, hashed=False)
    write_statistics(
        folder / STATISTICS,
        {
            module: PointStatistics(
                torch.randn(gate[0].shape),
                torch.randn(gate[0].shape[1]),
                torch.rand(2, gate[0].shape[1]).half(),
                torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64),
            )
            for module, gate in read_gates(folder, manifest).own.items()
        },
    )
    names = (MANIFEST, EXPERTS, GATES, STATISTICS)
    return Sound({name: (folder / name).read_bytes() for name in names}, folder, world.base)


def from_the_hub(repo_id: str, revision: str, *_: object, **__: object) -> Path:
    """In place of a download: what is asked for is a commit of a repository."""
    assert resolve.is_hub_id(repo_id)
    assert COMMIT.fullmatch(revision)
    raise SourceError("not here")


def read(sound: Sound) -> Manifest:
    """Read all files, and the tensors for `meteora add`, if they are there."""
    folder = resolve.find_checkpoint(str(sound.folder))
    manifest = read_all(folder)
    if manifest.router.kind == "gate" and (folder / STATISTICS).exists():
        points = read_statistics(folder, manifest, gates := read_gates(folder, manifest))
        add_expert.drop(gates, points, 0, manifest.modules)
        assert all(
            part.isfinite().all() for point in points.values() for part in vars(point).values()
        )
    return manifest


def load(sound: Sound, manifest: Manifest) -> None:
    """Load it into its base, and give it a prompt."""
    model, _ = meteora.load(sound.folder, base_folder=sound.base)
    tensors = itertools.chain(model.parameters(), model.buffers())
    assert all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())
    with torch.inference_mode():
        model(torch.tensor([[1, 5, 6, 9, 9, 7]]))
    if manifest.router.kind == "gate":
        template = read_gates(sound.folder, manifest).template
        parts = template.opening + template.closing + template.header + template.footer
        assert all(0 <= token <= MAX_TOKEN for token in parts)


def write(sound: Sound, manifest: Manifest) -> None:
    """Write what is made of a checkpoint: adapters, and one with an expert less."""
    room = sound.folder.with_name("room")
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    out = room / "in" / "out"
    try:
        for make in (
            lambda: export.export_expert(sound.folder, manifest.names[0], out / "peft"),
            lambda: gguf_export.export_gguf(sound.folder, out / "gguf"),
            lambda: edit.drop_expert(sound.folder, manifest.names[0], room / "dropped"),
        ):
            refusal(make)
    finally:
        assert {path.name for path in room.iterdir()} <= {"in", "dropped"}
        assert {path.name for path in (room / "in").iterdir()} <= {"out"}


def refusal(door: Callable[..., Any], *given: Any) -> str:
    """What is said where a door refuses; empty where it does not."""
    try:
        door(*given)
    except MeteoraError as error:
        message = str(error)
        assert message
        assert message.isprintable()
        assert len(message) < LONGEST
        return message
    return ""


def most_memory() -> int:
    """The most that this process has had, in kB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fuzz(sound: Sound, seeds: range) -> tuple[int, int]:
    """Read a changed checkpoint for each seed; returns how many were read, and how many loaded."""
    num_read = num_loaded = 0
    slowest = 0.0
    for number, seed in enumerate(seeds, 1):
        mutator.lay(sound.folder, sound.files, random.Random(seed))
        begin = time.process_time()
        try:
            with no_stall(), little_work():
                manifest: list[Manifest] = []
                if refusal(lambda: manifest.append(read(sound))):  # noqa: B023  (called at once)
                    continue
                num_read += 1
                num_loaded += not refusal(load, sound, *manifest)
                refusal(resolve.load_base, *manifest, None, "auto")
                write(sound, *manifest)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        finally:
            slowest = max(slowest, time.process_time() - begin)
            if number % 10_000 == 0:
                counts = f"{number} changed, {num_read} read, {num_loaded} loaded"
                log.warning(
                    "%s; slowest %.2f s, at most %d MB", counts, slowest, most_memory() // 1000
                )
    return num_read, num_loaded


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "download_base", from_the_hub)


def test_a_changed_checkpoint_loads_or_is_refused(sound: Sound) -> None:
    num_read, num_loaded = fuzz(sound, range(400))
    assert num_read > 60  # else nothing is tested but the first check
    assert num_loaded > 60


@pytest.mark.slow
def test_a_hundred_thousand_changed_checkpoints_load_or_are_refused(sound: Sound) -> None:
    fuzz(sound, range(2_000, 3_000))
    before = most_memory()
    num_read, num_loaded = fuzz(sound, range(3_000, 103_000))
    assert min(num_read, num_loaded) > 1_000
    assert most_memory() - before < MOST_MEMORY


def test_the_files_before_a_change_are_sound(sound: Sound) -> None:
    shutil.rmtree(sound.folder)
    sound.folder.mkdir()
    for name, data in sound.files.items():
        (sound.folder / name).write_bytes(data)
    manifest = read(sound)
    load(sound, manifest)
    write(sound, manifest)
    assert json.loads(sound.files[MANIFEST])["files"] == {}
