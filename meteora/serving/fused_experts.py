"""The experts of projections that a server computes as one.

    transformers   q_proj, k_proj, v_proj          gate_proj, up_proj          o_proj
    vLLM           qkv_proj [OUT of q │ k │ v]     gate_up_proj                o_proj

The server computes its projection, and the experts of each part are added to that part of the
output. Routers, experts and kernels are those that the model has in transformers.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import read_manifest
from meteora.model.fused import choices_of, make_router, stack_for
from meteora.routing.gates import give_router, new_decisions, share_first_matmuls
from meteora.routing.layer import RoutedExperts
from meteora.serving.served_folder import UnservableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from meteora.checkpoint.manifest import Manifest
    from meteora.checkpoint.tensors import Gates
    from meteora.routing.routers import Decision


class Part(NamedTuple):
    """The place of one projection in the output of the one that the server computes."""

    path: str
    """The module's path in transformers."""
    start: int
    end: int


class FusedExperts(nn.Module):
    """The experts of one projection of a server, which is one or several of the model's."""

    def __init__(self, layers: Mapping[Part, RoutedExperts]) -> None:
        """Take the layers in the order of their calls: a gate stands before what follows it."""
        super().__init__()
        self._parts = [(part.start, part.end, layer) for part, layer in layers.items()]
        self.layers = nn.ModuleList(layers.values())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add what the experts give to y [T, OUT of all parts] in place, from x [T, IN]."""
        for start, end, layer in self._parts:
            layer.add(x, y[:, start:end])


class ServedExperts:
    """All experts and gates of a checkpoint, given out as a server builds its layers."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest of a checkpoint; its tensors are read when they are needed."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)

    def __getstate__(self) -> dict[str, Path]:
        """Only the place: another process reads the tensors itself."""
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.folder = state["folder"]
        self.manifest = read_manifest(self.folder)

    @cached_property
    def _gates(self) -> Gates:
        return tensors.read_gates(self.folder, self.manifest)

    @cached_property
    def _decisions(self) -> dict[str, Decision]:
        return new_decisions(self._gates)

    def build(self, parts: Sequence[Part], weight: Tensor) -> FusedExperts:
        """The experts of one projection of the server.

        Args:
            parts: of its output, each a module that has experts
            weight: of the projection; the experts lie where it does

        Raises:
            UnservableError: a part has another size than its experts.
        """
        options, layers = self.manifest.router, {}
        paths = [part.path for part in parts]
        read = tensors.read_experts(self.folder, self.manifest, paths)
        for part, (path, a, b) in zip(parts, read, strict=True):
            entry = self.manifest.modules[path]
            found = weight.shape[1], part.end - part.start
            if found != (entry.in_features, entry.out_features):
                raise UnservableError(
                    f"{path}: the experts take {entry.in_features} inputs and give"
                    f" {entry.out_features}, this layer has {found}; serve them with the base they"
                    " were made for, on one device"
                )
            stack = stack_for(weight, a, b, entry, choices_of(entry, options))
            layer = layers[part] = RoutedExperts(stack)
            if options.kind == "gate":
                give_router(layer, path, self._gates, options, self._decisions)
            else:
                layer.router = make_router(options, layer)
        if options.kind == "gate" and options.share == "point":
            by_path = {part.path: layer for part, layer in layers.items()}
            within = {p: q for p, q in self._gates.follows.items() if {p, q} <= by_path.keys()}
            share_first_matmuls(by_path, within)
        return FusedExperts(layers)

    def decides_elsewhere(self, parts: Sequence[Part]) -> bool:
        """Whether a part follows a gate outside of them, or a gate of theirs is followed there."""
        if self.manifest.router.kind != "gate":
            return False
        paths = {part.path for part in parts}
        return any((p in paths) != (q in paths) for p, q in self._gates.follows.items())


def parts_of(parent: str, names: Sequence[str], sizes: Sequence[int]) -> Iterator[Part]:
    """The parts of one projection of a server, by the paths that it would give them.

    Args:
        parent: the path of the module that holds it
        names: of the modules that it joins
        sizes: of its output, for each of them; or more, where it is one module
    """
    if len(names) == 1:
        sizes = [sum(sizes)]
    if len(names) != len(sizes):
        raise UnservableError(
            f"{parent}: this model joins {', '.join(names)} in {len(sizes)} parts, which is not"
            " supported with experts"
        )
    end = 0
    for name, size in zip(names, sizes, strict=True):
        end += size
        yield Part(f"{parent}.{name}" if parent else name, end - size, end)
