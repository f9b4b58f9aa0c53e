"""Fit the gates in one forward sweep, without a backward pass through the model.

`calibrate` goes through the model layer by layer, as post-training quantisation does. At each point
where modules share an input (q, k, v; o; gate, up; down) it fits the gate to that input *as the
layers below produce it with their new gates*, then goes on with this gate in place. A fit of all
layers at once, on inputs that are routed by the labels, does not see that wrong choices below
change the inputs above.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from meteora import __version__
from meteora.artifacts import NULL, SHARED, canonical_sha256
from meteora.artifacts.routers import POINT_GATES
from meteora.base.placement import input_device
from meteora.fitting.covariance import RowScatter, Scatter, Sums
from meteora.fitting.layerwise import Sweep
from meteora.fitting.lda import GIVEN_UP, SingularError, choose_shrinkage, gate_from, lead_of_last
from meteora.fitting.logistic import ONE_ROUND, Tokens, refine
from meteora.fitting.sequences import (
    MAX_ROWS,
    UNLABELLED,
    Batch,
    LabelledSequence,
    TrainingError,
    batched,
    hold_out,
    renumbered,
    sampled,
    token_weights,
)
from meteora.fitting.statistics import PointStatistics
from meteora.fitting.training_state import FittedPoint
from meteora.model.fused import expert_names, without_dropout
from meteora.model.opening_offsets import find_offsets
from meteora.routing.gates import (
    Sharing,
    give_follower,
    give_gate,
    give_offsets,
    old_routers_after_error,
    watch_prompts,
)
from meteora.routing.layer import routed_layers
from meteora.routing.weight_scores import StandIn, scorer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from meteora.artifacts import RouterOptions
    from meteora.base.chat_template import Template
    from meteora.routing.layer import MoELoRALinear

MAX_TOKEN_BYTES = 1 << 30
"""Tokens of a point are kept in memory up to this size; of more, only a sample is."""


@dataclass(frozen=True)
class Calibration:
    """The result of a sweep; the gates themselves are in the model."""

    num_tokens: int
    """Labelled tokens that the gates were fitted on."""
    heldout_accuracy: float
    """Share of held-out tokens that go to their own expert, weighted as in the fit
    (`token_weights`); the mean over input points."""
    accuracy_of: dict[str, float]
    """The same for each input point, by the path of its first module."""
    statistics: dict[str, PointStatistics]
    """Statistics of each input point, by the path of its first module. With them an expert can be
    added later."""
    wall_seconds: float


def calibrate(
    model: PreTrainedModel,
    sequences: Sequence[LabelledSequence],
    options: RouterOptions = POINT_GATES,
    *,
    template: Template | None = None,
    refined: bool = True,
    offsets: bool = True,
    seed: int = 0,
    scratch: Path | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Calibration:
    """Give every routed layer a gate that is fitted to `sequences`, in place.

    Args:
        model: with its experts inserted; routers that it has are replaced
        sequences: two or more for each expert
        options: how the gates route, during the sweep and afterwards. With a `stand_in`, experts
            without sequences are scored from their weights, and every module has its own gate;
            without it every expert needs sequences
        template: the chat template's opening, if the whole prompt decides for these tokens
        refined: whether the closed form is where logistic regression starts, or is the gate
        offsets: whether each expert gets those that make up for an opening by all experts, where
            the router has such openings
        seed: chooses the held-out sequences
        scratch: a folder for hidden states that do not fit in memory
        folder: where each point is kept when it is fitted; those that a sweep of the same sequences
            has left there are not fitted again. Without effect where an expert has no sequences
        progress: called with (layers done, layers in all)

    Raises:
        TrainingError: an expert has too few sequences, or an input holds NaN or infinity.
        SweepError: the model cannot be run layer by layer.
    """
    started = time.perf_counter()
    every, owners = expert_names(model), {e for s in sequences for e in s.owners}
    without = [e for e in range(len(every)) if options.stand_in and e not in owners]
    fitted = [e for e in range(len(every)) if e not in without]
    if {every[e] for e in fitted} <= {SHARED, NULL}:
        raise TrainingError(
            "no expert has examples, and the other experts are scored beside one that has; give two"
            f" or more of one, or a router of kind {options.stand_in!r}"
        )
    names = [every[e] for e in fitted]
    added: dict[str, Tensor] = {}
    if offsets and SHARED in every:
        pairs = [(s.input_ids, s.experts) for s in sequences]
        added = find_offsets(model, pairs, every.index(SHARED))
    sequences = [renumbered(sequence, fitted) for sequence in sequences]
    heldout = hold_out(sequences, names, seed)
    batches = sampled(list(batched(sequences, heldout, input_device(model))), len(names))
    weights = token_weights(batches, len(names))
    accuracy_of: dict[str, float] = {}
    statistics: dict[str, PointStatistics] = {}
    tokens_of_others = torch.empty(0)  # of the last point, where experts have no sequences

    def fit(paths: Sequence[str], inputs: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal tokens_of_others
        path = paths[0]
        scatter, every_token, num_fit = _scatter_of(inputs, batches, weights, len(names))
        tokens, held = every_token.between(0, num_fit), every_token.between(num_fit)
        shrinkage, accuracy = choose_shrinkage(scatter[0], held.accuracy)
        both = scatter[0] + scatter[1]
        statistics[path] = PointStatistics.of(both, shrinkage)
        weight, bias = gate_from(scatter[0] if refined else both, shrinkage)
        if refined:
            weight, bias = refine(weight, bias, tokens, statistics[path])
            accuracy = held.accuracy(weight, bias)
            weight, bias = refine(weight, bias, every_token, statistics[path], ONE_ROUND)
        accuracy_of[path] = accuracy
        if names[-1] == NULL:
            bias[-1] += lead_of_last(held.x @ weight.T + bias, held.labels)
        if not without:
            return weight, bias
        tokens_of_others = held.x
        rows = torch.tensor(fitted, device=weight.device)
        return (
            weight.new_zeros(len(every), weight.shape[1]).index_copy(0, rows, weight),
            bias.new_zeros(len(every)).index_copy(0, rows, bias),
        )

    def give(layer: MoELoRALinear, *asked: Any) -> None:  # noqa: ANN401  (those of `give_gate`)
        give_gate(layer, *asked, stand_in=_stand_in(options, layer, without, tokens_of_others))

    if without:  # a stand-in is scaled on the tokens of each point, so it is fitted each time
        share = options.share if options.share == "turn" else "module"
        options, folder = replace(options, share=share), None
    asked = [asdict(options), refined, offsets, seed, template and asdict(template)]
    once = _Once(fit, accuracy_of, statistics, folder, _asked_sha256(model, sequences, asked))
    sweep_gates(
        model,
        batches,
        options,
        template,
        once,
        give=give if without else give_gate,
        offsets=added,
        scratch=scratch,
        progress=progress,
    )
    return Calibration(
        num_tokens=sum(int((b.labels != UNLABELLED).sum()) for b in batches),
        heldout_accuracy=sum(accuracy_of.values()) / len(accuracy_of),
        accuracy_of=accuracy_of,
        statistics=statistics,
        wall_seconds=time.perf_counter() - started + once.seconds_before,
    )


@dataclass
class _Once:
    """Fits a point, unless a stopped sweep of the same sequences has left its gate in `folder`."""

    fit: Callable[[Sequence[str], Iterator[Tensor]], tuple[Tensor, Tensor]]
    accuracy_of: dict[str, float]
    statistics: dict[str, PointStatistics]
    folder: Path | None
    asked_sha256: str
    seconds_before: float = 0.0
    """How long the fits took that are not repeated."""

    def __call__(self, paths: Sequence[str], inputs: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
        """The gate of the modules that share an input, G [E, IN] and c [E]."""
        if self.folder is None:
            return self.fit(paths, inputs)
        path, began = paths[0], time.perf_counter()
        point = FittedPoint.read(self.folder, path, self.asked_sha256)
        if point is None:
            gate = self.fit(paths, inputs)
            spent = time.perf_counter() - began
            point = FittedPoint(*gate, self.statistics[path], self.accuracy_of[path], spent)
            point.write(self.folder, path, self.asked_sha256)
            return gate
        self.seconds_before += point.wall_seconds
        self.statistics[path], self.accuracy_of[path] = point.statistics, point.accuracy
        return point.weight, point.bias


def _asked_sha256(
    model: PreTrainedModel, sequences: Sequence[LabelledSequence], asked: list[Any]
) -> str:
    """A hash of what every bit of a gate depends on, but for the weights of base and experts."""
    machine = [
        __version__,
        str(torch.__version__),
        torch.get_num_threads(),
        str(input_device(model)),
    ]
    return canonical_sha256(
        [*asked, *machine, str(model.dtype), expert_names(model), list(routed_layers(model))]
        + [[s.input_ids, s.experts, s.openings] for s in sequences]
    )


def sweep_gates(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    options: RouterOptions,
    template: Template | None,
    fit: Callable[[Sequence[str], Iterator[Tensor]], tuple[Tensor, Tensor] | None],
    *,
    give: Callable[..., None] = give_gate,
    offsets: Mapping[str, Tensor] = MappingProxyType({}),
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Give every routed layer a gate, fitted to its inputs as the gates below it route them.

    Args:
        fit: called with the paths of the modules that share an input, and that input [B, L, IN]
            batch by batch; returns G [E, IN] and c [E], or None: the modules then use the decision
            of the gate before them
        give: puts G and c into a layer, as `give_gate` does
        offsets: by module path, as `find_offsets` returns them
    """
    layers = routed_layers(model)
    with swept(model):
        watcher = watch_prompts(model, template, options)
        pairs = [(b.input_ids, b.attention_mask) for b in batches]
        sweep = Sweep(model, pairs, watcher, scratch=scratch)
        sharing = Sharing(options.share, len(sweep.layers))

        def fit_layer(index: int) -> None:
            for paths in sweep.points(index):
                point = [layers[path] for path in paths]
                decided = sharing.decided(index)
                if decided is None:
                    gate = _fit_point(fit, paths, sweep.inputs(index, paths[0]))
                    if gate is None:
                        decided = sharing.last(paths[0])
                    else:
                        weight, bias = gate
                        alone = options.share == "module" or bool(options.stand_in)
                        leaders = point if alone else point[:1]
                        decided = sharing.new(index)
                        if options.share == "token":
                            sweep.follow(decided)
                        for layer in leaders:
                            give(layer, weight.clone(), bias.clone(), options, watcher, decided)
                        point = point[len(leaders) :]
                for layer in point:
                    give_follower(layer, decided, options)
                for path in paths:
                    give_offsets(layers[path], offsets.get(path))

        for index in range(len(sweep.layers)):
            with sweep.held(index):
                fit_layer(index)
                sweep.advance(index)
            progress(index + 1, len(sweep.layers))


def _fit_point(
    fit: Callable[[Sequence[str], Iterator[Tensor]], tuple[Tensor, Tensor] | None],
    paths: Sequence[str],
    inputs: Iterator[Tensor],
) -> tuple[Tensor, Tensor] | None:
    """What `fit` gives; its errors say which module they are about."""
    try:
        return fit(paths, inputs)
    except SingularError as error:
        raise TrainingError(f"{paths[0]}: {error}") from error


@contextmanager
def swept(model: PreTrainedModel) -> Generator[None]:
    """Remove all routers and turn dropout off; after an error the old routers are put back."""
    with without_dropout(model), old_routers_after_error(model):
        for layer in routed_layers(model).values():
            layer.router = None
        yield


def _scatter_of(
    inputs: Iterator[Tensor],
    batches: Sequence[Batch],
    weights: Sequence[Tensor],
    num_experts: int,
) -> tuple[list[Sums], Tokens, int]:
    """Sums over the labelled tokens of one input point, and these tokens.

    Returns:
        the sums of the sequences to fit and of the held-out ones; the tokens of both, in this
        order, or a sample of them above `MAX_TOKEN_BYTES`; and how many are of the former
    """
    num_labelled = sum(int((b.labels != UNLABELLED).sum()) for b in batches)
    scatters: list[Sums] = []
    kept: tuple[list[Tokens], ...] = ([], [])
    for x, batch, counted in zip(inputs, batches, weights, strict=True):
        num_inputs = x.shape[-1]
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
            if 4 * num_inputs * num_labelled > MAX_TOKEN_BYTES:
                tokens = tokens.sampled(stands_for)
            kept[held].append(tokens)
    # hold_out leaves tokens of every expert to fit, and of the first expert at least to check
    to_fit, to_check = kept
    return scatters, Tokens.of(to_fit + to_check), sum(len(part.x) for part in to_fit)


def _stand_in(
    options: RouterOptions, layer: MoELoRALinear, experts: list[int], tokens: Tensor
) -> StandIn:
    """A scorer for experts without examples, scaled on tokens [T, IN] of the other experts."""
    score = scorer(options, layer).to(tokens.device)
    found = score(tokens)[:, experts].float()
    mean, deviation = found.mean(0), found.std(0)
    standing_out = ((found - mean) / deviation.clamp_min(1e-12)).max(-1).values
    # at least one deviation above the mean, whatever the tokens are
    threshold = standing_out.quantile(1 - GIVEN_UP).clamp_min(1.0).expand(len(experts))
    return StandIn(score, experts, torch.stack([mean, deviation, threshold]))
