"""Run a model one decoder layer at a time over many sequences, and read the input of any module.

This works for any architecture. The layers are found from the paths of the routed modules. The
arguments of each layer are recorded during the model's own forward pass. Modules share an input if
they receive the same tensor.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from meteora.artifacts import MeteoraError
from meteora.artifacts.specs import place_of
from meteora.base import placement
from meteora.base.placement import replaced_forward
from meteora.routing.layer import MoELoRALinear, require_a_row_of_each_token, routed_layers
from meteora.routing.passes import PassInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.routing.prompt_opening import PromptOpening
    from meteora.routing.routers import Decision
    from meteora.routing.turns import Turns

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a layer, without the hidden states."""
MAX_HIDDEN_BYTES = 2 << 30
"""If hidden states are larger, all are mapped from files, so that the system can page them."""
MAX_OUTPUT_BYTES = 1 << 30
"""Outputs of a layer's modules are kept up to this size; further ones are computed again."""


class SweepError(MeteoraError):
    """A model cannot be run layer by layer."""


class _Reached(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a forward pass at the module whose input is wanted."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


class _Saved(NamedTuple):
    """An output in CPU memory; if it was there it is no copy, so a model may overwrite it."""

    tensor: Tensor
    device: torch.device
    version: int | None
    """Of the tensor when it was saved; torch counts what overwrites it, but not through `.data` or
    numpy. None: it counts nothing in inference mode, so this is a copy."""

    @classmethod
    def of(cls, output: Tensor) -> Self:
        tensor = output.to("cpu")
        if tensor.is_inference():
            return cls(output.to("cpu", copy=True), output.device, None)
        return cls(tensor, output.device, tensor._version)

    def read(self) -> Tensor | None:
        """The output, where it was computed; None if it was overwritten."""
        if self.version is None:
            return self.tensor.to(self.device, copy=True)
        is_as_saved = self.tensor._version == self.version
        return self.tensor.to(self.device) if is_as_saved else None


class _Part(NamedTuple):
    """What a child of a layer returned: a tensor, or a tuple of it and of `None`s."""

    output: _Saved
    beside: tuple[None, ...] | None
    """The other items of the tuple; None if it was a tensor."""


class Sweep:
    """The hidden states of all sequences at the input of one layer; `advance` runs that layer.

    Between calls everything is kept in CPU memory, so that a device holds the states of one batch.

    Use `run`, or in order: for each layer, inside `held`: for each of its `points`, `inputs`; then
    `advance`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[tuple[Tensor, Tensor]],
        watcher: PromptOpening | Turns | None = None,
        *,
        before_batch: Callable[[int], None] = lambda _batch: None,
        scratch: Path | None = None,
    ) -> None:
        """Take batches of (input_ids [B, L], attention_mask [B, L]), padded on the right.

        Args:
            watcher: sees each batch before it runs, since the model's own forward does not run
            before_batch: called with the number of a batch before a layer runs on it
            scratch: a folder for hidden states beyond `MAX_HIDDEN_BYTES`; None: keep all in memory

        Raises:
            SweepError: the model cannot be run layer by layer.
        """
        self.model = model
        self._batches, self._watcher, self._before_batch = batches, watcher, before_batch
        self._scratch: Path | None = None
        prefix, self._routed = _by_layer(model)
        """The routed modules of each layer, by module path."""
        self.layers = cast("nn.ModuleList", model.get_submodule(prefix))
        self.points: list[list[list[str]]] = []
        """Of each layer: the routed modules in groups that share an input, in call order."""
        self._num_outputs = 0
        """The length of the tuple that a layer returns, hidden states first; 0 if it returns no
        tuple, but hidden states alone."""
        self._decision: Decision | None = None
        self._decided: dict[int, tuple[Decision, Tensor]] = {}
        """By batch: the decision of the gate that later layers follow."""
        self._hidden: list[Tensor] = []
        self._calls: dict[int, list[Call]] = {}
        """By batch: the arguments of each layer; with a scratch folder, of one batch only."""
        self._outputs: dict[tuple[int, str], tuple[_Saved, Tensor | None]] = {}
        """By batch and path: the output of a module of the present layer, and its gate's logits."""
        self._parts: dict[tuple[int, str], _Part] = {}
        """By batch and name: the output of a child of the present layer."""
        self._output_bytes = 0
        self._device = batches[0][0].device
        self._rehearse(*(part[:1] for part in batches[0]))
        if sum(ids.numel() for ids, _ in batches) * self._token_bytes > MAX_HIDDEN_BYTES:
            self._scratch = scratch
        for batch, pair in enumerate(batches):
            hidden, calls = self._record(*pair)
            if self._scratch is None:
                self._calls[batch] = calls
            else:
                hidden = self._in_a_file(hidden, self._scratch)
            self._hidden.append(hidden.cpu())

    def _rehearse(self, ids: Tensor, mask: Tensor) -> None:
        """Refuse a model whose layers pass each other more than hidden states."""
        ends: list[Tensor] = []

        def keep(_module: nn.Module, _args: object, output: Any) -> None:  # noqa: ANN401
            self._num_outputs = len(output) if isinstance(output, tuple) else 0
            ends.append(output[0] if self._num_outputs else output)

        with self.layers[-1].register_forward_hook(keep):
            self._forward(ids, mask)
        if not ends:  # the layers that look at images
            raise _not_called(self.model, next(iter(routed_layers(self.model))))
        hidden, self._calls[0] = self._record(ids, mask)
        self._hidden.append(hidden)
        for index in range(len(self.layers)):
            with self.held(index):
                self.points.append(self._points(index))
                self.advance(index)
        if not torch.allclose(self._hidden.pop(), ends[0].cpu(), 1e-3, 1e-3, equal_nan=True):
            raise SweepError(
                f"the layers of {type(self.model).__name__} hand each other more than hidden"
                " states, so gates cannot be fitted layer by layer; use a router without gates"
            )
        self._calls.clear()
        self._token_bytes = ends[0].nbytes // ids.numel()

    def _forward(self, ids: Tensor, mask: Tensor) -> None:
        with torch.no_grad():
            self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)

    def _record(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[Call]]:
        """The input of the first layer, and the arguments of each layer; runs none of them."""
        calls: list[Call] = []
        first: list[Tensor] = []

        def record(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            first.append(hidden)
            calls.append((args, kwargs))
            return (hidden, *[None] * (self._num_outputs - 1)) if self._num_outputs else hidden

        with ExitStack() as replaced:
            for layer in self.layers:
                replaced.enter_context(replaced_forward(layer, record))
            self._forward(ids, mask)
        return first[0], calls

    def _in_a_file(self, hidden: Tensor, folder: Path) -> Tensor:
        """The same numbers, mapped from an unlinked file, which is freed with the tensor."""
        path = folder / f"hidden-{len(self._hidden)}"
        try:
            # written before it is mapped: a full disk raises an error here, and kills there
            path.write_bytes(hidden.cpu().contiguous().view(torch.uint8).numpy().data)
            mapped = torch.from_file(
                str(path), shared=True, size=hidden.numel(), dtype=hidden.dtype
            )
        except OSError as error:
            raise SweepError(
                f"hidden states cannot be kept in {folder}: {error}; make room there, or"
                " give fewer examples"
            ) from error
        finally:
            path.unlink(missing_ok=True)
        return mapped.view(hidden.shape)

    def _run(self, index: int, batch: int) -> Tensor:
        if batch not in self._calls:  # masks would not fit in memory either
            self._calls = {batch: self._record(*self._batches[batch])[1]}
        args, kwargs = self._calls[batch][index]
        self._before_batch(batch)
        if self._watcher is not None:
            ids, mask = self._batches[batch]
            self._watcher.see(PassInput(ids, mask.bool(), goes_on=False))
        if batch in self._decided:
            decision, logits = self._decided[batch]
            decision.logits, decision.routes = logits, None
        hidden = self._hidden[batch].to(self._device)
        out = self.layers[index](hidden, *args, **kwargs)
        return out[0] if self._num_outputs else out

    def _output(self, index: int, batch: int, path: str, layer: MoELoRALinear, x: Tensor) -> Tensor:
        """The output of a module with its final router, computed once for each batch."""
        saved = self._outputs.get((batch, path))
        if saved is not None and (output := saved[0].read()) is not None:
            self._decide_again(index, batch, path)
            return output
        output = type(layer).forward(layer, x)
        if saved is not None or self._has_room_for(output):
            decision = _decision_of(layer)
            logits = None if decision is None else decision.logits
            self._outputs[batch, path] = _Saved.of(output), logits
        return output

    def _has_room_for(self, output: Tensor) -> bool:
        """Whether one more output of the present layer may be kept; if so, it is counted."""
        if self._scratch is not None or self._output_bytes + output.nbytes > MAX_OUTPUT_BYTES:
            return False
        self._output_bytes += output.nbytes
        return True

    def _decide_again(self, index: int, batch: int, path: str) -> None:
        """Give the modules that follow a saved one the decision that its gate made."""
        decision, (_, logits) = _decision_of(self._routed[index][path]), self._outputs[batch, path]
        if decision is not None and logits is not None:
            decision.logits, decision.routes = logits, None

    def _run_once(self, index: int, batch: int) -> Tensor:
        """As `_run`, but modules that already ran for this batch return their saved output."""
        with ExitStack() as replaced:
            for path, layer in self._routed[index].items():
                forward = partial(self._output, index, batch, path, layer)
                replaced.enter_context(replaced_forward(layer, forward))
            for name, part in self.layers[index].named_children():
                if not isinstance(part, MoELoRALinear):
                    forward = partial(self._output_of_part, index, batch, name, part.forward)
                    replaced.enter_context(replaced_forward(part, forward))
            return self._run(index, batch)

    def _output_of_part(
        self,
        index: int,
        batch: int,
        name: str,
        forward: Callable[..., Any],
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The output of a child of a layer; it is saved once all routed modules in it are.

        So attention runs twice for each batch, and not once for each point of its layer. Eager
        attention, which returns its weights, too, is not saved.
        """
        inside = [path for path in self._routed[index] if f".{index}.{name}." in path]
        saved = self._parts.get((batch, name))
        if saved is not None and (output := saved.output.read()) is not None:
            for path in inside:
                self._decide_again(index, batch, path)
            return output if saved.beside is None else (output, *saved.beside)
        out = forward(*args, **kwargs)
        output, beside = (out[0], out[1:]) if type(out) is tuple and out else (out, None)
        is_final = inside and all((batch, path) in self._outputs for path in inside)
        is_alone = isinstance(output, Tensor) and all(one is None for one in beside or ())
        if is_final and is_alone and (saved is not None or self._has_room_for(output)):
            self._parts[batch, name] = _Part(_Saved.of(output), beside)
        return out

    def run(
        self, visit: Callable[[int, Sequence[str]], None], progress: Callable[[int, int], None]
    ) -> None:
        """Run all layers, each after a visit of its points.

        Args:
            visit: called with a layer's number and the modules of a point; it may read their
                `inputs`, and change their routers
            progress: called with (layers done, layers in all)
        """
        for index in range(len(self.layers)):
            with self.held(index):
                for paths in self.points[index]:
                    visit(index, paths)
                self.advance(index)
            progress(index + 1, len(self.layers))

    @contextmanager
    def held(self, index: int) -> Generator[None]:
        """A context in which a layer and its experts stay on its device, even if it is offloaded.

        So a base that does not fit on a device is read once, not once for each call.
        """
        with ExitStack() as stack:
            stack.enter_context(placement.held(self.layers[index]))
            for layer in self._routed[index].values():
                stack.enter_context(layer.whole())
            yield

    def follow(self, decision: Decision) -> None:
        """Remember a gate's decision for each batch, for the layers above that follow it.

        Modules of the present layer may still follow the gate before it.
        """
        self._decision = decision

    def _points(self, index: int) -> list[list[str]]:
        """The routed modules of a layer that share an input, by running it on the first batch.

        Raises:
            SweepError: the model does not call one of them, or calls one several times.
        """
        seen: list[tuple[Tensor, list[str]]] = []  # keeps tensors alive: no address is reused

        def see(path: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for x, paths in seen:
                if x is args[0]:
                    paths.append(path)
                    return
            seen.append((args[0], [path]))

        with ExitStack() as hooks, torch.no_grad():
            for path, layer in self._routed[index].items():
                hooks.enter_context(layer.register_forward_pre_hook(partial(see, path)))
            self._run(index, 0)
        called = Counter(path for _, paths in seen for path in paths)
        # Mamba only reads the weights of `dt_proj`; a Bart alone has no encoder to attend to
        if unused := sorted(self._routed[index].keys() - called.keys()):
            raise _not_called(self.model, unused[0])
        if several := [path for path, times in called.items() if times > 1]:
            raise SweepError(
                f"{type(self.model).__name__} calls {several[0]} several times in a pass, and a"
                " gate decides once for each token; leave the adapters that target it out, or use"
                " a router without gates"
            )
        return [paths for _, paths in seen]

    def inputs(self, index: int, path: str) -> Iterator[Tensor]:
        """The input of one routed module, batch by batch: [B, L, IN]. The layer stops there.

        The routers of the modules before it must not change until `advance`.

        Raises:
            MeteoraError: it has other rows than one for each token.
        """

        def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Reached(args[0])

        with self._routed[index][path].register_forward_pre_hook(stop):
            for batch in range(len(self._hidden)):
                try:
                    with torch.no_grad():
                        self._run_once(index, batch)
                except _Reached as reached:
                    x = reached.x.to(self._device)  # its layer may be on another one
                    ids, _ = self._batches[batch]
                    require_a_row_of_each_token(path, x, ids.numel())
                    # OPT's layers work on tokens [B × L, IN]
                    yield x.reshape(*ids.shape, -1)
                else:
                    raise SweepError(f"{path} was not called when its layer ran")

    def advance(self, index: int) -> None:
        """Run one layer with the routers that it has now, over all batches."""
        with torch.no_grad():
            for batch in range(len(self._hidden)):
                out = self._run_once(index, batch)
                if self._decision is not None and self._decision.logits is not None:
                    self._decided[batch] = self._decision, self._decision.logits
                if self._scratch is None:
                    self._hidden[batch] = out.cpu()
                    self._calls[batch][index] = ((), {})  # not needed again: frees its tensors
                else:
                    self._hidden[batch].copy_(out)
        self._outputs.clear()
        self._parts.clear()
        self._output_bytes = 0


def _decision_of(layer: MoELoRALinear) -> Decision | None:
    """The decision that the layer's gate makes for others."""
    return getattr(layer.router, "decision", None)


def _not_called(model: PreTrainedModel, path: str) -> SweepError:
    return SweepError(
        f"{type(model).__name__} does not call {path}, so adapters have no effect there; leave"
        " those that target it out"
    )


def _by_layer(model: PreTrainedModel) -> tuple[str, dict[int, dict[str, MoELoRALinear]]]:
    """The path of the stack of layers, and the routed modules of each layer by their paths.

    Raises:
        SweepError: a module is in no numbered layer, or they are in several stacks.
    """
    by_layer: dict[int, dict[str, MoELoRALinear]] = defaultdict(dict)
    prefixes = set()
    for path, layer in routed_layers(model).items():
        place = place_of(path)
        if place is None:
            raise SweepError(
                f"{path} is not inside a numbered layer, so gates cannot be fitted layer by"
                " layer; leave the adapters that target it out, or use a router without gates"
            )
        prefixes.add(place.stem)
        by_layer[place.layer][path] = layer
    if len(prefixes) != 1:
        raise SweepError(
            f"the routed modules lie in {', '.join(sorted(prefixes)) or 'no layers'}; gates can"
            " be fitted for one stack of layers"
        )
    return prefixes.pop(), by_layer
