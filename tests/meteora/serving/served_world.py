"""Checkpoints with every kind of router, and gates whose choices differ from token to token."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from meteora.artifacts import RouterOptions
from meteora.base.chat_template import Template
from meteora.base.sources import weights_sha256
from meteora.checkpoint.manifest import EXPERTS, GATES, MANIFEST
from meteora.checkpoint.tensors import Gates, write_gates
from meteora.routing.gates import insert_gates
from tests.conftest import ATTENTION, MLP

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from meteora.checkpoint.manifest import Manifest
    from tests.conftest import World

ROUTER_ID = "router:" + "0" * 64
ORDER = [*ATTENTION, *MLP]
"""The modules of a layer, in the order of their calls."""
JOINED = {"qkv_proj": ORDER[:3], "o_proj": ["o_proj"], "gate_up_proj": ORDER[4:6]}
JOINED["down_proj"] = ["down_proj"]
"""The modules that vLLM computes as one, which share an input."""
NO_TEMPLATE = Template()


def random_gates(
    manifest: Manifest, template: Template, with_offsets: Sequence[str] = ("o_proj",)
) -> Gates:
    """Gates for a Llama's modules, shared as the manifest says.

    Args:
        with_offsets: the last names of modules that have some
    """
    torch.manual_seed(0)
    points = {name: point for point, names in JOINED.items() for name in names}
    own, follows, leaders = {}, {}, {}
    places = {path: path.split(".") for path in manifest.modules}
    for path, words in sorted(places.items(), key=lambda x: (x[1][2], ORDER.index(x[1][-1]))):
        layer, name = words[2], words[-1]
        point, share = (layer, points[name]), manifest.router.share
        group = {"point": point, "turn": point, "layer": (layer,)}.get(share, (path,))
        if (leader := leaders.setdefault(group, path)) == path:
            num_in, num_choices = manifest.modules[path].in_features, len(manifest.choices)
            own[path] = torch.randn(num_choices, num_in), torch.randn(num_choices)
        else:
            follows[path] = leader
    offsets = {
        path: torch.randn(len(manifest.choices), entry.out_features)
        for path, entry in manifest.modules.items()
        if path.rpartition(".")[2] in with_offsets
    }
    return Gates(own, follows, template, offsets=offsets)


def gated(world: World, share: str, template: Template = NO_TEMPLATE) -> PreTrainedModel:
    """A model with such gates, some of which decide for several layers, or tokens."""
    options, model = RouterOptions("gate", 1, 1.0, share=share), world.load()
    manifest = dataclasses.replace(world.manifest, router=options)
    insert_gates(model, random_gates(manifest, template, ()), options)
    return model


def with_router(
    checkpoint: Path,
    manifest: Manifest,
    base: Path,
    options: RouterOptions,
    out: Path,
    template: Template = NO_TEMPLATE,
) -> Path:
    """A copy of a checkpoint, with another router and the hash of its base."""
    out.mkdir()
    entry = dataclasses.replace(manifest.base, revision=f"sha256:{weights_sha256(base)}")
    made = dataclasses.replace(manifest, base=entry, router=options, router_id=ROUTER_ID)
    (out / MANIFEST).write_text(made.to_json())
    (out / EXPERTS).symlink_to(checkpoint / EXPERTS)
    if options.kind == "gate":
        write_gates(out / GATES, random_gates(made, template))
    return out
