"""Fit the gates in one forward sweep, without a backward pass through the model.

`calibrate` goes through the model layer by layer, as post-training quantisation does. At each point
where modules share an input (q, k, v; o; gate, up; down) it fits the gate to that input *as the
layers below produce it with their new gates*, then goes on with this gate in place. A fit of all
layers at once, on inputs that are routed by the labels, does not see that wrong choices below
change the inputs above.

Gates memorise the sequences of their fit. On these they choose correctly even at tokens that do not
show the expert yet, such as the number of a list. The gates above would learn to follow this
choice, which is mostly wrong in new prompts. So a sweep may be `crossed`: it routes each half of
the sequences by gates that were fitted to the other half, as stacked generalization does
(Wolpert 1992). The final gates are fitted to all sequences, on these inputs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from meteora import __version__
from meteora.artifacts import NULL, SHARED, RouterOptions, canonical_sha256
from meteora.artifacts.routers import POINT_GATES
from meteora.base.placement import input_device
from meteora.fitting.covariance import RowScatter, Scatter, Sums
from meteora.fitting.layerwise import Sweep
from meteora.fitting.lda import Chosen, SingularError, bias_for_base, choose_shrinkage, gate_from
from meteora.fitting.logistic import ONE_ROUND, Tokens, refine
from meteora.fitting.sequences import (
    HELDOUT_SHARE,
    MAX_ROWS,
    UNLABELLED,
    Batch,
    LabelledSequence,
    TrainingError,
    batched,
    hold_out,
    in_halves,
    renumbered,
    sampled,
    token_weights,
)
from meteora.fitting.statistics import Fit, PointStatistics
from meteora.fitting.training_state import FittedPoint
from meteora.model.fused import expert_names, without_dropout
from meteora.model.opening_offsets import find_offsets
from meteora.routing.gates import (
    Sharing,
    give_gate,
    give_offsets,
    old_routers_after_error,
    watch_prompts,
)
from meteora.routing.layer import MoELoRALinear, routed_layers
from meteora.routing.routers import Follower, Gate, Router
from meteora.routing.weight_scores import StandIn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.base.chat_template import Template

MAX_TOKEN_BYTES = 1 << 30
"""Up to this size all tokens of a point are kept in memory; above it, a sample."""


_Tensors = tuple[torch.Tensor, torch.Tensor]
"""G [E, IN] and c [E] of a gate."""
_Unseen = tuple[Tokens, _Tensors]
"""Tokens, and a gate that was not fitted to them."""


class _Part(NamedTuple):
    """Labelled tokens of one input point."""

    sums: Sums
    """Over all of them."""
    tokens: Tokens
    """All of them, or a sample above `MAX_TOKEN_BYTES`."""


class _Halves:
    """Routes each half of the sequences by gates that were fitted to the other half."""

    def __init__(self, batches: Sequence[Batch] = ()) -> None:
        """Take batches of one half each, as `in_halves` makes them; without any, do nothing."""
        self.crosses = bool(batches)
        self._is_held = [bool(batch.heldout.any()) for batch in batches]
        self.gates: tuple[_Tensors, ...] = ()
        """The gates of the last fitted point: of the sequences to fit, and of the held-out ones."""
        self._placed: list[tuple[Gate, _Tensors, tuple[_Tensors, ...]]] = []
        """The gates of the present layer, their final tensors, and those of the halves."""

    def place(self, router: Router | None) -> None:
        """Add a gate of the point that was fitted last to those that are exchanged."""
        if self.crosses and isinstance(router, Gate):
            self._placed.append((router, (router.weight.data, router.bias.data), self.gates))

    def before_batch(self, batch: int) -> None:
        """Use the gates that were not fitted to this batch."""
        for gate, _, of_halves in self._placed:
            _put(gate, of_halves[not self._is_held[batch]])

    def end_layer(self) -> None:
        """Use the gates that were fitted to all sequences."""
        for gate, own, _ in self._placed:
            _put(gate, own)
        self._placed.clear()


def _put(gate: Gate, tensors: _Tensors) -> None:
    for parameter, tensor in zip((gate.weight, gate.bias), tensors, strict=True):
        parameter.data = tensor.to(parameter.device)


def calibrate(
    model: PreTrainedModel,
    sequences: Sequence[LabelledSequence],
    options: RouterOptions = POINT_GATES,
    *,
    template: Template | None = None,
    refined: bool = True,
    crossed: bool = False,
    offsets: bool = True,
    seed: int = 0,
    scratch: Path | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Fit:
    """Give every routed layer a gate that is fitted to `sequences`, in place.

    Args:
        model: with its experts inserted; routers that it has are replaced
        sequences: two or more for each expert
        options: how the gates route, during the sweep and afterwards. With a `stand_in`, experts
            without sequences are scored from their weights, and every module has its own gate;
            without it every expert needs sequences
        template: the tokens around every prompt, if the prompt or a turn decides as a whole
        refined: whether logistic regression refines the closed form
        crossed: whether each half of the sequences is routed by gates of the other half during the
            sweep; only with `refined`, and if each expert has tokens in both halves
        offsets: whether experts get offsets, if the router has a choice of all experts
        seed: chooses the held-out sequences
        scratch: a folder for hidden states that do not fit in memory
        folder: keeps each fitted point; a later sweep of the same sequences does not fit it again.
            Without effect if an expert has no sequences
        progress: called with (layers done, layers in all)

    Raises:
        TrainingError: an expert has too few sequences, or an input holds NaN or infinity.
        SweepError: the model cannot be run layer by layer.
    """
    started = time.perf_counter()
    choices, owners = expert_names(model), {e for s in sequences for e in s.owners}
    experts = [e for e, name in enumerate(choices) if name not in {SHARED, NULL}]
    without = [e for e in experts if options.stand_in and e not in owners]
    fitted = [e for e in range(len(choices)) if e not in without]
    if len(without) == len(experts):
        raise TrainingError(
            "no expert has examples, and the other experts are scored beside one that has; give two"
            f" or more of one, or a router of kind {options.stand_in!r}"
        )
    names = [choices[e] for e in fitted]
    pairs = [(s.input_ids, s.experts) for s in sequences]
    added = find_offsets(model, pairs) if offsets else {}
    if without:  # a stand-in is scaled on the tokens of each point, so it is fitted each time
        sequences = [renumbered(sequence, fitted) for sequence in sequences]
        own = options.share if options.share == "turn" else "module"
        options, folder = replace(options, share=own), None
    batches, halves, not_crossed = _divided(
        sequences, names, seed, input_device(model), crossed=crossed and refined
    )
    weights = token_weights(batches, len(names))
    heldout_tokens = torch.empty(0)  # of the last point, to scale stand-ins on

    def fit(inputs: Iterator[Tensor]) -> FittedPoint:
        nonlocal heldout_tokens
        began = time.perf_counter()
        to_fit, held, every = _parts_of(inputs, batches, weights, len(names))
        chosen = choose_shrinkage(to_fit.sums, held.tokens.accuracy)
        statistics = PointStatistics.of(every.sums, chosen.shrinkage)
        if refined:
            weight, bias, unseen = _refined(
                to_fit, held, every.tokens, statistics, chosen, crosses=halves.crosses
            )
            accuracy = sum(tokens.accuracy(*gate) for tokens, gate in unseen) / len(unseen)
        else:
            weight, bias = gate_from(every.sums, chosen.shrinkage)
            unseen, accuracy = ((held.tokens, (weight, bias)),), chosen.accuracy
        of_halves = tuple(gate for _, gate in unseen) if halves.crosses else ()
        if names[-1] == NULL:
            lead = bias_for_base([(one.x @ g.T + c, one.labels) for one, (g, c) in unseen])
            for own in (bias, *(of_half for _, of_half in of_halves)):
                own[-1] += lead
        if without:
            heldout_tokens = held.tokens.x
            of_halves = tuple(_spread(*gate, fitted, len(choices)) for gate in of_halves)
            weight, bias = _spread(weight, bias, fitted, len(choices))
        spent = time.perf_counter() - began
        return FittedPoint(weight, bias, statistics, accuracy, spent, of_halves)

    def stand_in_of(layer: MoELoRALinear) -> StandIn | None:
        return StandIn.scaled(options, layer, without, heldout_tokens) if without else None

    asked = [asdict(options), refined, offsets, seed, template and asdict(template), crossed]
    sha256 = _asked_sha256(model, sequences, asked)
    once = _Once(fit, folder, sha256, halves)
    sweep_gates(
        model,
        batches,
        options,
        template,
        once,
        stand_in_of=stand_in_of,
        offsets=added,
        halves=halves,
        scratch=scratch,
        progress=progress,
    )
    return Fit(
        num_tokens=sum(int((b.labels != UNLABELLED).sum()) for b in batches),
        heldout_accuracy=sum(once.accuracy_of.values()) / len(once.accuracy_of),
        accuracy_of=once.accuracy_of,
        statistics=once.statistics,
        wall_seconds=time.perf_counter() - started + once.seconds_before,
        not_crossed=not_crossed,
    )


def _divided(
    sequences: Sequence[LabelledSequence],
    names: Sequence[str],
    seed: int,
    device: torch.device,
    *,
    crossed: bool,
) -> tuple[list[Batch], _Halves, tuple[str, ...]]:
    """Batches of a sweep, the gates of their halves, and the experts in one half alone."""
    share = 0.5 if crossed else HELDOUT_SHARE
    heldout = hold_out(sequences, names, seed, share)
    both = {e for i in heldout for e in sequences[i].owners}  # the other half has every expert
    missing = tuple(name for e, name in enumerate(names) if crossed and e not in both)
    divide = in_halves if crossed and not missing else batched
    batches = sampled(list(divide(sequences, heldout, device)), len(names), share)
    return batches, _Halves(batches if divide is in_halves else ()), missing


def _spread(
    weight: Tensor, bias: Tensor, places: Sequence[int], num_choices: int
) -> tuple[Tensor, Tensor]:
    """G and c with rows at these places alone, and zeros at the other choices."""
    rows = torch.tensor(places, device=weight.device)
    return (
        weight.new_zeros(num_choices, weight.shape[1]).index_copy(0, rows, weight),
        bias.new_zeros(num_choices).index_copy(0, rows, bias),
    )


def _refined(
    to_fit: _Part,
    held: _Part,
    every: Tokens,
    point: PointStatistics,
    chosen: Chosen,
    *,
    crosses: bool,
) -> tuple[Tensor, Tensor, tuple[_Unseen, ...]]:
    """The gate by logistic regression; held-out tokens, with a gate that was not fitted to them.

    Args:
        chosen: on the sums over the tokens to fit
        crosses: whether the tokens to fit, too, are returned with a gate of the held-out ones
    """
    gate = refine(*chosen.gate, to_fit.tokens, point)
    unseen = ((held.tokens, gate),)
    if crosses:
        other = refine(*gate_from(held.sums, chosen.shrinkage), held.tokens, point)
        unseen = (*unseen, (to_fit.tokens, other))
        gate = (gate[0] + other[0]) / 2, (gate[1] + other[1]) / 2
    return *refine(*gate, every, point, ONE_ROUND), unseen


@dataclass
class _Once:
    """Fits a point, unless a stopped sweep of the same sequences has left its gate in `folder`."""

    fit: Callable[[Iterator[Tensor]], FittedPoint]
    folder: Path | None
    asked_sha256: str
    halves: _Halves
    accuracy_of: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, PointStatistics] = field(default_factory=dict)
    seconds_before: float = 0.0
    """Time of the fits that were read from the folder."""

    def __call__(self, paths: Sequence[str], inputs: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """The gate of the modules that share an input, G [E, IN] and c [E]."""
        path, folder = paths[0], self.folder
        point = None if folder is None else FittedPoint.read(folder, path, self.asked_sha256)
        if point is not None:
            self.seconds_before += point.wall_seconds
        else:
            point = self.fit(inputs)
            if folder is not None:
                point.write(folder, path, self.asked_sha256)
        self.halves.gates = point.halves
        self.statistics[path], self.accuracy_of[path] = point.statistics, point.accuracy
        return point.weight, point.bias


def _asked_sha256(
    model: PreTrainedModel, sequences: Sequence[LabelledSequence], asked: list[Any]
) -> str:
    """A hash of everything that changes a gate, except the weights of base and experts."""
    machine = [
        __version__,
        str(torch.__version__),
        torch.get_num_threads(),
        str(input_device(model)),
    ]
    return canonical_sha256(
        [*asked, *machine, str(model.dtype), expert_names(model), list(routed_layers(model))]
        + [[s.input_ids, s.experts, s.answer_starts] for s in sequences]
    )


def sweep_gates(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    options: RouterOptions,
    template: Template | None,
    fit: Callable[[Sequence[str], Iterator[Tensor]], tuple[Tensor, Tensor] | None],
    *,
    stand_in_of: Callable[[MoELoRALinear], StandIn | None] = lambda _layer: None,
    leaves_out: bool = False,
    offsets: Mapping[str, Tensor],
    halves: _Halves | None = None,
    scratch: Path | None = None,
    progress: Callable[[int, int], None],
) -> None:
    """Give every routed layer a gate, fitted to its inputs as the gates below it route them.

    Args:
        fit: called with the paths of the modules that share an input, and that input [B, L, IN]
            batch by batch; returns G [E, IN] and c [E], or None: the modules then use the decision
            of the gate before them
        stand_in_of: of a layer that gets a gate
        leaves_out: whether `fit` may return None; decisions are then kept for the layers above
        offsets: by module path, as `find_offsets` returns them
        halves: routes each half of the sequences by the other half's gates until a layer is done
    """
    layers, halves = routed_layers(model), halves or _Halves()
    _refuse_readers_of_the_cache(layers, options)
    with swept(model):
        watcher = watch_prompts(model, template, options)
        pairs = [(b.input_ids, b.attention_mask) for b in batches]
        sweep = Sweep(model, pairs, watcher, before_batch=halves.before_batch, scratch=scratch)
        sharing = Sharing(options.share, len(sweep.layers))
        each_has_a_gate = options.share == "module" or bool(options.stand_in)
        is_followed_above = options.share == "token" or leaves_out

        def route_point(index: int, paths: Sequence[str]) -> None:
            gate, decided = None, sharing.decided(index)
            if decided is None:
                try:
                    gate = fit(paths, sweep.inputs(index, paths[0]))
                except SingularError as error:
                    raise TrainingError(f"{paths[0]}: {error}") from error
                decided = sharing.last(paths[0]) if gate is None else sharing.new(index)
                if is_followed_above:
                    sweep.follow(decided)
            for path in paths:
                layer = layers[path]
                if gate is not None and (each_has_a_gate or path == paths[0]):
                    weight, bias = (part.clone() for part in gate)
                    stand_in = stand_in_of(layer)
                    give_gate(layer, weight, bias, options, watcher, decided, stand_in)
                    halves.place(layer.router)
                else:
                    layer.router = Follower(decided, layer.num_choices, options)
                give_offsets(layer, offsets.get(path))

        def end_layer(done: int, total: int) -> None:
            halves.end_layer()
            progress(done, total)

        sweep.run(route_point, end_layer)


def _refuse_readers_of_the_cache(paths: Iterable[str], options: RouterOptions) -> None:
    """Refuse decisions that are made once for a token, if a module gets each token repeatedly."""
    readers = (".kv_b_proj", ".self_attn.dt_proj")  # DeepSeek's and Doge's
    again = next((path for path in paths if path.endswith(readers)), None)
    if again and options.share in ("layer", "token", "turn"):
        raise TrainingError(
            f"{again} gets all tokens of the cache with each new one, so it cannot follow a"
            f" decision that is made once (`share: {options.share}`); choose `share: point`"
        )


@contextmanager
def swept(model: PreTrainedModel) -> Generator[None]:
    """Remove all routers and turn dropout off; after an error the old routers are put back."""
    with without_dropout(model), old_routers_after_error(model):
        for layer in routed_layers(model).values():
            layer.router = None
        yield


def _parts_of(
    inputs: Iterator[Tensor],
    batches: Sequence[Batch],
    weights: Sequence[Tensor],
    num_experts: int,
) -> tuple[_Part, _Part, _Part]:
    """The labelled tokens of one input point: those to fit, those held out, and all."""
    num_labelled = sum(int((b.labels != UNLABELLED).sum()) for b in batches)
    scatters: list[Sums] = []
    places: list[int] = []  # of the next token to fit, and of the next held-out one
    for x, batch, counted in zip(inputs, batches, weights, strict=True):
        num_inputs = x.shape[-1]
        is_sampled = 4 * num_inputs * num_labelled > MAX_TOKEN_BYTES
        if not places:  # allocated once: growing would copy gigabytes
            num_fit, num_checked = _num_kept(batches, is_sampled=is_sampled)
            every = Tokens.empty(num_fit + num_checked, x)
            places = [0, num_fit]
        for held in (False, True):
            chosen = (batch.labels != UNLABELLED) & (batch.heldout == held)
            tokens = Tokens(x[chosen].float(), batch.labels[chosen], counted[chosen])
            if not len(tokens.x):
                continue
            if not scatters:  # the form with the smaller matrix
                form = Scatter if num_inputs <= min(num_labelled, MAX_ROWS) else RowScatter
                shift = tokens.x.mean(0)
                scatters = [form.empty(num_experts, shift) for _ in range(2)]
            stands_for = batch.stands_for[chosen]
            scatters[held].add(*tokens, stands_for)
            tokens = tokens.sampled(stands_for) if is_sampled else tokens
            every.put(places[held], tokens)
            places[held] += len(tokens.x)
    # hold_out leaves tokens of every expert to fit, and of the first expert at least to check
    to_fit, held_out = scatters
    return (
        _Part(to_fit, every.between(0, num_fit)),
        _Part(held_out, every.between(num_fit)),
        _Part(to_fit + held_out, every),
    )


def _num_kept(batches: Sequence[Batch], *, is_sampled: bool) -> list[int]:
    """How many labelled tokens to fit are kept, and how many held-out ones."""
    sizes = [0, 0]
    for batch in batches:
        kept = (batch.labels != UNLABELLED) & ((batch.stands_for > 0) | (not is_sampled))
        for held in (False, True):
            sizes[held] += int((kept & (batch.heldout == held)).sum())
    return sizes
