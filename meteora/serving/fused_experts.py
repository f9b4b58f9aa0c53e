"""Build the experts of projections that a server computes as one.

    transformers   q_proj, k_proj, v_proj          gate_proj, up_proj          o_proj
    vLLM           qkv_proj [OUT of q │ k │ v]     gate_up_proj                o_proj

The server computes its projection, and the experts of each part are added to that part of the
output. Routers, experts and kernels are those that the model has in transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from meteora.artifacts.routers import ONE_INPUT
from meteora.checkpoint import tensors
from meteora.checkpoint.manifest import Manifest, read_manifest
from meteora.checkpoint.tensors import ExpertsFile, Gates
from meteora.kernels import dispatch
from meteora.kernels.stack import ExpertStack
from meteora.model.fused import choices_of, make_router, stack_for
from meteora.routing.gates import give_router, new_decisions, share_first_matmuls
from meteora.routing.layer import RoutedExperts
from meteora.routing.routers import Decision, Follower, Gate
from meteora.serving.folded_experts import FoldedExperts, MakeLinear, plain_linear
from meteora.serving.served_turns import ServedTurns
from meteora.serving.vllm_version import UnservableError


class Part(NamedTuple):
    """The place of one projection in the output of the one that the server computes."""

    path: str
    """The module's path in transformers."""
    start: int
    end: int


DECODED = 64
"""Most tokens of a pass that only decodes, one for each request; a prefill has more."""


class FusedExperts(nn.Module):
    """The experts of one projection of a server, which joins one or several of the model's."""

    def __init__(
        self, layers: Mapping[Part, RoutedExperts | FoldedExperts], *, inline: bool
    ) -> None:
        """Take the layers in the order of their calls: a gate comes before its followers.

        Args:
            inline: whether torch.compile may take the arithmetic into its graph
        """
        super().__init__()
        self.inline = inline
        self.layers = nn.ModuleList(layers.values())
        self._parts = [(part.start, part.end, layer) for part, layer in layers.items()]
        self._widths = [0] * len(layers)
        """How many rows each layer has in the server's weight."""

    def join(self, weight: Tensor) -> Tensor:
        """Give the server what its own matmul can compute of the experts; call it once.

        Args:
            weight: [OUT, IN] of the projection

        Returns:
            [OUT + N, IN] the weight that the server is to multiply by before it calls `add`.
        """
        for i, (_, _, layer) in enumerate(self._parts):
            rows = layer.take_rows() if isinstance(layer, FoldedExperts) else None
            if rows is not None:
                self._widths[i] = len(rows)
                weight = torch.cat([weight, rows])
        return weight

    @property
    def num_joined(self) -> int:
        """N, how many outputs of the server's matmul are the experts'."""
        return sum(self._widths)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the experts' update for x to the server's product.

        Args:
            x: [..., IN]
            y: [..., OUT + N] of x and the weight of `join`

        Returns:
            [..., OUT] of all parts; y itself, changed in place, if N is 0.
        """
        out = y.shape[-1] - self.num_joined
        x, flat = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        _, *firsts = flat.split([out, *self._widths], dim=-1)
        if self.num_joined:
            flat = flat[:, :out].contiguous()
        for (start, end, layer), first in zip(self._parts, firsts, strict=True):
            if isinstance(layer, FoldedExperts):
                layer.add(x, flat[:, start:end], first)
            else:
                layer.add(x, flat[:, start:end])
        return flat.view(*y.shape[:-1], out)


class ServedExperts:
    """All experts and gates of a checkpoint, for a server that builds its layers one by one."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest of a checkpoint; its tensors are read when they are needed."""
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self.options = self.manifest.router
        self.turns: ServedTurns | None = None
        """The turns of the present pass, if gates decide for whole turns."""

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        """Only the folder: another process reads the tensors itself."""
        return type(self), (self.folder,)

    @cached_property
    def _file(self) -> ExpertsFile:
        """The file of experts, which is checked once and stays open."""
        self._open = ExitStack()
        return self._open.enter_context(tensors.open_experts(self.folder, self.manifest))

    @cached_property
    def _gates(self) -> Gates:
        """Empty if the router is of another kind."""
        has_gates = self.options.kind == "gate"
        return tensors.read_gates(self.folder, self.manifest) if has_gates else Gates({})

    @cached_property
    def _decisions(self) -> dict[str, Decision]:
        return new_decisions(self._gates)

    def read_turns(self, num_requests: int, num_tokens: int) -> ServedTurns:
        """Prepare gates that decide for whole turns, before the first `build`.

        A pass has at most so many requests and tokens.
        """
        _, bias = next(iter(self._gates.own.values()))
        self.turns = ServedTurns(
            self._gates.template,
            num_choices=len(bias),
            num_held=2 * num_requests,  # requests that wait for a pass keep their decisions, too
            num_tokens=num_tokens,
        )
        return self.turns

    def build(
        self, parts: Sequence[Part], weight: Tensor, linear: MakeLinear = plain_linear
    ) -> FusedExperts:
        """Build the experts of one projection of the server.

        Args:
            parts: of its output, each a module that has experts
            weight: of the projection; the experts get its device
            linear: makes the linear layers of `FoldedExperts`

        Raises:
            UnservableError: a part has another size than its experts, or its gate decides for whole
                turns and `read_turns` was not called.
        """
        if self.options.by_turns and self.turns is None:
            raise UnservableError(
                f"{self.folder}: its gates wait for whole questions, and vLLM's model of this base"
                " shows no tokens to a plugin; set `router: {share: point}` in the recipe"
            )
        layers = {part: self._layer_of(part, weight) for part in parts}
        closed = not self._decides_elsewhere(parts)
        if closed and (merged := self._merged(layers)):
            layers = merged
        self._route(layers)
        inline = closed and all(
            _is_dense(layer, self.options.top_k) and not isinstance(layer.router, Follower)
            for layer in layers.values()
        )
        if not inline:
            self._share(layers)
            return FusedExperts(layers, inline=False)
        for layer in layers.values():
            if isinstance(layer.router, Gate):
                layer.router.decision = None  # no layer follows it, and a graph has no side effects
        folded = {
            part: FoldedExperts.of(layer, linear, weight.dtype) or layer
            for part, layer in layers.items()
        }
        return FusedExperts(folded, inline=True)

    def _layer_of(self, part: Part, weight: Tensor) -> RoutedExperts:
        """The experts of one part, without a router."""
        entry, sizes = self.manifest.modules[part.path], (weight.shape[1], part.end - part.start)
        if sizes != (entry.in_features, entry.out_features):
            raise UnservableError(
                f"{part.path}: the experts take {entry.in_features} inputs and give"
                f" {entry.out_features}, this layer has {sizes}; serve them with the base they"
                " were made for, on one device"
            )
        a, b = self._file.factors(part.path)
        choices = choices_of(entry.ranks, self.options)
        return RoutedExperts(stack_for(weight, a, b, entry, choices))

    def _route(self, layers: Mapping[Part, RoutedExperts]) -> None:
        """Give each layer its router."""
        options = self.options
        for part, layer in layers.items():
            if options.kind == "gate":
                give_router(layer, part.path, self._gates, options, self._decisions, self.turns)
            else:
                layer.router = make_router(options, layer)

    def _share(self, layers: Mapping[Part, RoutedExperts]) -> None:
        """Let layers that follow one gate compute A x together."""
        if self.options.share in ONE_INPUT:
            by_path = {part.path: layer for part, layer in layers.items()}
            within = {p: q for p, q in self._gates.follows.items() if {p, q} <= by_path.keys()}
            share_first_matmuls(by_path, within)

    def _merged(self, layers: Mapping[Part, RoutedExperts]) -> dict[Part, RoutedExperts] | None:
        """Merge layers that follow one gate into one layer, if that is fast.

            A   rows of expert 0: of q, of k, of v; of expert 1: …
            B   the same ranks, each zero outside of its own part of the output

        None if the experts are so large that another kernel than the dense one is faster: it would
        read the zeros.
        """
        (first, *others), stacks = layers, [layer.stack for layer in layers.values()]
        follows, offsets = self._gates.follows, self._gates.offsets
        if not others or any(follows.get(part.path) != first.path for part in others):
            return None
        if any(part.path in offsets for part in layers):  # each adds its own
            return None
        size, num_experts = max(part.end for part in layers) - first.start, len(stacks[0].ranks)
        a: list[Tensor] = []
        b: list[Tensor] = []
        for e in range(num_experts):
            for part, stack in zip(layers, stacks, strict=True):
                a_own, b_own = stack.pair(e)
                a.append(a_own)
                above, below = part.start - first.start, first.start + size - part.end
                b.append(nn.functional.pad(b_own, (0, 0, above, below)))
        # an expert may have a scaling of its own in each part
        ranks = [stack.ranks[e] for e in range(num_experts) for stack in stacks]
        scaling = [stack.scaling[e] for e in range(num_experts) for stack in stacks]
        together = [sum(stack.ranks[e] for stack in stacks) for e in range(num_experts)]
        choices = choices_of(together, self.options)
        stack = ExpertStack(torch.cat(a), torch.cat(b, dim=1), ranks, scaling, choices)
        layer = RoutedExperts(stack)
        whole = Part(first.path, first.start, first.start + size)
        return {whole: layer} if _is_dense(layer, self.options.top_k) else None

    def in_order(self, parts: Sequence[Part]) -> bool:
        """Whether these parts share state with other operators, so that their order counts."""
        return self.options.by_turns or self._decides_elsewhere(parts)

    def _decides_elsewhere(self, parts: Sequence[Part]) -> bool:
        """Whether a part follows a gate of another projection, or the reverse."""
        paths = {part.path for part in parts}
        return any((p in paths) != (q in paths) for p, q in self._gates.follows.items())


def _is_dense(layer: RoutedExperts, top_k: int) -> bool:
    """Whether the dense kernel in a graph is the fastest for few tokens, from two to `DECODED`.

    For one token and for many, another may be a little faster.
    """
    asked = top_k, layer.stack.sizes, layer.stack.a.dtype, layer.device.type
    counts = [1 << n for n in range(1, DECODED.bit_length())]
    kernels = {dispatch.choose_kernel(count, *asked, in_graph=True) for count in counts}
    return kernels == {"dense"}


def parts_of(parent: str, names: Sequence[str], sizes: Sequence[int]) -> Iterator[Part]:
    """The parts of one projection of a server, with the paths that the server would give them.

    Args:
        parent: the path of the module that holds it
        names: of the modules that it joins
        sizes: of the output of each joined module; several if it is one module

    Raises:
        UnservableError: the numbers of names and sizes differ.
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
