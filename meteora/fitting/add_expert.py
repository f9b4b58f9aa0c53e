"""Add an expert to fitted gates, or drop one, without the examples of the other experts.

One sweep over the new expert's examples gives the mean and the covariance of its tokens. With the
statistics of the other experts its row of every gate follows in closed form. Dropping an expert
drops its row of every gate. The rows of the other experts do not change in any bit, so routing
among them stays as it is.

If the gates were also fitted to prompts of several tasks, the new expert's sequences include lists
of its own examples, and tokens that open its answers have the same weight as in that fit
(`by_kind`). Such a list shows how the expert answers a numbered question. It cannot show which
task comes next, as it holds one task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meteora.artifacts import NULL, SHARED, RouterOptions
from meteora.base.placement import input_device
from meteora.checkpoint.tensors import Gates
from meteora.fitting.calibrate import sweep_gates
from meteora.fitting.lda import SHARE_LOST_TO_BASE, SingularError, solve_gate
from meteora.fitting.logistic import Tokens, scaled
from meteora.fitting.sequences import (
    MAX_ROWS,
    TrainingError,
    batched,
    by_kind,
    hold_out,
    renumbered,
)
from meteora.fitting.statistics import Fit, without
from meteora.model.fused import expert_names
from meteora.model.opening_offsets import find_offsets
from meteora.untrusted.findings import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.checkpoint.manifest import ModuleEntry
    from meteora.fitting.covariance import Covariance
    from meteora.fitting.sequences import Batch, LabelledSequence
    from meteora.fitting.statistics import PointStatistics

SHARE_LOST = 0.01
"""The share of a new expert's own tokens that goes to others, so that they keep theirs."""
OWN, OF_OPENING = 0, 1
"""Labels of the new expert's tokens, and of those that go to the mean of all experts."""
DRAWN = 512
"""Most tokens of each other expert that are drawn at a point; of all together `MAX_ROWS`."""


def grow(
    model: PreTrainedModel,
    sequences: Sequence[LabelledSequence],
    gates: Gates,
    statistics: Mapping[str, PointStatistics],
    options: RouterOptions,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Fit:
    """Give every gate a row for one more expert, from its examples and the others' statistics.

    Args:
        model: with all experts inserted, the new one included
        sequences: two or more, of the new expert alone; with lists of its examples if the others
            were fitted to prompts of several tasks. Tokens before those that show its task may be
            labelled with the mean of all experts, if that is a choice; they stay with it
        gates: without the new expert
        statistics: of these gates, by module path
        options: how the gates route; the same as before
        progress: called with (layers done, layers in all)

    Raises:
        TrainingError: the examples or the statistics do not fit the model, or its inputs hold NaN
            or infinity.
        SweepError: the model cannot be run layer by layer.
    """
    started = time.perf_counter()
    expert = _new_expert(model, sequences, statistics)
    names = expert_names(model)
    null = names[-1] == NULL
    alone = [renumbered(sequence, [expert]) for sequence in sequences]
    heldout = hold_out(alone, [names[expert]], seed=0)
    owners = [expert, *(place for place, name in enumerate(names) if name == SHARED)]
    labelled = [renumbered(sequence, owners) for sequence in sequences]
    batches = list(batched(labelled, heldout, input_device(model)))
    grown: dict[str, PointStatistics] = {}
    accuracies: list[float] = []

    def fit(paths: Sequence[str], inputs: Iterator[Tensor]) -> tuple[Tensor, Tensor] | None:
        before = next((path for path in paths if path in statistics), None)
        if before is None:  # a new point: it follows the gate of an earlier one
            return None
        fitted, checked, opening = _tokens_by_kind(inputs, batches)
        known = statistics[before].to(input_device(model))
        kinds = [(share, x[:: -(-len(x) // MAX_ROWS)]) for share, x in fitted]
        point, covariance = known.grown(kinds, expert)
        grown[paths[0]] = point
        own = gates.own[before]
        others = own[0].to(input_device(model)), own[1].to(input_device(model))
        gate = _with_one_more(others, known, point, covariance, kinds, expert, null=null)
        _keep_to_its_own(*gate, [x for _, x in checked], opening, expert)
        if not all(part.isfinite().all() for part in (*gate, *vars(point).values())):
            raise SingularError("the gate or the statistics of this point hold numbers too large")
        right = [((x @ gate[0].T + gate[1]).argmax(-1) == expert).float() for _, x in checked]
        shares = [share for share, _ in checked]
        accuracies.append(sum(s * own.mean().item() for s, own in zip(shares, right, strict=True)))
        return gate

    offsets = _more_offsets(model, sequences, gates.offsets, expert)
    sweep_gates(
        model,
        batches,
        options,
        gates.template,
        fit,
        leaves_out=True,
        offsets=offsets,
        progress=progress,
    )
    return Fit(
        num_tokens=sum(int((batch.labels == OWN).sum()) for batch in batches),
        heldout_accuracy=sum(accuracies) / len(accuracies),
        wall_seconds=time.perf_counter() - started,
        statistics=grown,
    )


def _more_offsets(
    model: PreTrainedModel,
    sequences: Sequence[LabelledSequence],
    before: Mapping[str, Tensor],
    expert: int,
) -> dict[str, Tensor]:
    """Offsets with a row for one more expert, of the modules that have offsets."""
    if not before:
        return {}
    pairs = [(sequence.input_ids, sequence.experts) for sequence in sequences]
    new = find_offsets(model, pairs, list(before))
    more = {}
    for path, rows in before.items():
        own = new[path][expert] if path in new else torch.zeros(rows.shape[1])
        more[path] = torch.cat([rows[:expert], own[None], rows[expert:]])
    return more


def _with_one_more(
    gate: tuple[Tensor, Tensor],
    before: PointStatistics,
    point: PointStatistics,
    covariance: Covariance,
    kinds: Sequence[tuple[float, Tensor]],
    expert: int,
    *,
    null: bool = False,
) -> tuple[Tensor, Tensor]:
    """A gate with a row for one more expert; the rows of the others do not change in any bit.

    The row is that of linear discriminant analysis, scaled on the expert's own tokens and on tokens
    of the others that are drawn from their statistics. It is not refined on these: tokens that all
    experts share, such as the template's, lie in a few places where no drawn token does, and the
    new row would take all of them from the others.

    With `null` the base, the last choice, has the lead that was right for the others
    (`bias_for_base`). The new bias is raised until at most `SHARE_LOST_TO_BASE` of the expert's own
    tokens go to the base, but not further than where it takes that share of the others' drawn ones.
    """
    mean = point.means[expert : expert + 1].double()
    row = solve_gate(covariance, mean, point.shift, point.shrinkage)
    if row is None:
        raise SingularError("the inputs of this point hold NaN or infinity")
    weight, bias = (
        torch.cat([part[:expert], own, part[expert:]]) for part, own in zip(gate, row, strict=True)
    )
    drawn = before.drawn(min(DRAWN, MAX_ROWS // len(before.means)))
    others = [e + (e >= expert) for e in range(len(drawn))]
    parts = [(expert, share, x) for share, x in kinds]
    parts += [(other, 1.0, x) for other, x in zip(others, drawn, strict=True)]
    tokens = Tokens(
        torch.cat([x for _, _, x in parts]),
        torch.cat([torch.full((len(x),), label, device=x.device) for label, _, x in parts]),
        torch.cat([x.new_full((len(x),), share / len(x)) for _, share, x in parts]),
    )
    weight, bias = scaled(weight, bias, tokens, slice(expert, expert + 1))
    if null:
        ahead = tokens.x @ weight.T + bias
        ahead -= ahead[:, expert : expert + 1].clone()  # of the new row
        lacks = ahead[tokens.labels == expert, -1].quantile(1 - SHARE_LOST_TO_BASE)
        ahead[:, expert] = -torch.inf
        of_others = (tokens.labels != expert) & (tokens.labels != len(bias) - 1)
        room = ahead[of_others].max(1).values.quantile(SHARE_LOST_TO_BASE)
        bias[expert] += torch.minimum(lacks, room).clamp_min(0)
    return weight, bias


def _keep_to_its_own(
    weight: Tensor, bias: Tensor, heldout: Sequence[Tensor], opening: Tensor, expert: int
) -> None:
    """Lower the new row's bias, in place, as far as held-out tokens of each kind allow.

    `SHARE_LOST` of these go to other choices then, and at least one; where more do, the bias stays.
    The statistics of the others are older than the new expert. Once a token of theirs goes to it,
    the layers above read its update in that token and in those after it, and take them for the new
    expert's own, which have more of it.

    The opening's tokens stand before all prompts of the others, too. At most `SHARE_LOST` of them
    go to the new expert, even if it gets none of its own at this point. With a limit to what it
    gives up, the others of six adapters lost more in the mean
    (`tests/benchmarks/results/gates.md`).

    Args:
        heldout: tokens [T, IN] of each kind
        opening: tokens [T, IN]; may be empty
    """

    def lead(x: Tensor) -> Tensor:
        logits = x @ weight.T + bias
        own = logits[:, expert].clone()
        logits[:, expert] = -torch.inf
        return own - logits.max(1).values

    less = torch.stack([lead(x).quantile(SHARE_LOST) for x in heldout]).min()
    if len(opening):
        less = less.maximum(lead(opening).quantile(1 - SHARE_LOST))
    bias[expert] -= less.clamp_min(0)


def _tokens_by_kind(
    inputs: Iterator[Tensor], batches: Sequence[Batch]
) -> tuple[list[tuple[float, Tensor]], list[tuple[float, Tensor]], Tensor]:
    """The new expert's tokens to fit, and those held out, each by kind; and the opening's.

    Openings differ only in their system prompts, so those of the first batch are enough. One of a
    single token, as without a chat template, is left out: the first token of a text is unlike all
    others.
    """
    halves: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
    opening = torch.empty(0)
    for x, batch in zip(inputs, batches, strict=True):
        if batch is batches[0] and (batch.labels[:, 1:] == OF_OPENING).any():
            opening = x[batch.labels == OF_OPENING].float()
        for held in (False, True):
            chosen = (batch.labels == OWN) & (batch.heldout == held)
            halves[held].append((x[chosen].float(), batch.answer_starts[chosen]))
    fitted, checked = (by_kind(*map(torch.cat, zip(*half, strict=True))) for half in halves)
    return fitted, checked, opening


def _new_expert(
    model: PreTrainedModel,
    sequences: Sequence[LabelledSequence],
    statistics: Mapping[str, PointStatistics],
) -> int:
    """The number of the new expert; refuses examples or statistics that do not fit the model."""
    names = expert_names(model)
    shared = {names.index(SHARED)} if SHARED in names else set()
    owners = set().union(*(sequence.owners for sequence in sequences)) - shared
    sizes = {len(point.means) for point in statistics.values()}
    num_choices = len(names)
    if len(owners) != 1 or sizes != {num_choices - 1}:
        raise TrainingError(
            f"the examples are of {counted(len(owners), 'expert')}, the model has {num_choices}"
            f" choices and the statistics are of {', '.join(map(str, sorted(sizes))) or 'none'};"
            " one expert is added at a time: give its examples only, and the statistics of all"
            " others"
        )
    return owners.pop()


def drop(
    gates: Gates,
    statistics: Mapping[str, PointStatistics],
    expert: int,
    modules: Mapping[str, ModuleEntry],
) -> tuple[Gates, dict[str, PointStatistics]]:
    """Gates and statistics without one expert; the rows of the others do not change.

    If only one expert is left, its offsets become zero: the mean of all experts is itself. Only
    `modules` stay.
    """
    own = {
        path: (without(weight, expert), without(bias, expert))
        for path, (weight, bias) in gates.own.items()
        if path in modules
    }
    follows = {path: leader for path, leader in gates.follows.items() if path in modules}
    offsets = {p: without(rows, expert) for p, rows in gates.offsets.items() if p in modules}
    for path, rows in offsets.items():
        if len(modules[path].ranks) == 1:
            rows.zero_()
    points = {}
    for path, point in statistics.items():
        # where each module has a gate, those that share an input have the same one
        gate = gates.own[path][0]
        same = (
            p for p in (path, *gates.own) if p in modules and torch.equal(gates.own[p][0], gate)
        )
        if (first := next(same, None)) is not None:
            points[first] = point.without(expert)
    return Gates(own, follows, gates.template, offsets=offsets), points
