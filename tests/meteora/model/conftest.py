"""A checkpoint whose gates were fitted."""

import dataclasses

import pytest

from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST
from meteora.fitting.calibrate import calibrate
from meteora.fitting.sequences import UNLABELLED
from meteora.model.fused import insert_experts
from meteora.routing.gates import gates_of
from tests.meteora.fitting.test_calibrate import examples


def with_shared(num_each: int, seed: int = 0):
    """Examples whose opening is labelled with the choice of all experts."""
    return [
        dataclasses.replace(s, experts=tuple(4 if e == UNLABELLED else e for e in s.experts))
        for s in examples(num_each, seed)
    ]


@pytest.fixture(scope="session")
def checkpoint(world, tmp_path_factory):
    """A checkpoint whose gates were fitted with a shared opening."""
    folder = tmp_path_factory.mktemp("shared")
    router = dataclasses.replace(world.manifest.router, kind="gate", opening="shared")
    manifest = dataclasses.replace(world.manifest, router=router)
    model = world.load_base()
    insert_experts(model, world.checkpoint, manifest)
    calibrate(model, with_shared(8))
    (folder / EXPERTS).hardlink_to(world.checkpoint / EXPERTS)
    tensors.write_gates(folder / GATES, gates_of(model))
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder
