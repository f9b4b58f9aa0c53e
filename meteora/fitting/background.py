"""Fit routers of kind `prompt` to background texts, which belong to no expert.

One sweep over these texts gives, at each input, the mean μ and the covariance Σ of the base's
tokens, and the size of each expert's update on each text; see `meteora.model.prompt_choice`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from meteora.artifacts import RouterOptions
from meteora.base.placement import input_device
from meteora.checkpoint.tensors import PromptGates
from meteora.fitting.calibrate import swept
from meteora.fitting.layerwise import Sweep
from meteora.fitting.sequences import UNLABELLED, LabelledSequence, TrainingError, batched
from meteora.model.prompt_choice import insert_prompt_routers, mean_of_others
from meteora.routing.layer import routed_layers
from meteora.routing.prompt_router import HeldChoice, PromptRouter
from meteora.routing.routers import Norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from meteora.base.chat_template import Template
    from meteora.kernels.stack import ExpertStack

RIDGE = 0.3
"""Added to the diagonal of the covariance, as a share of its mean."""
LEAST = 1e-12
"""The least value of a divisor."""
LEAST_TEXTS = 8
"""A standard deviation over fewer texts says little."""


def fit_to_background(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    options: RouterOptions,
    template: Template,
    *,
    scratch: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> PromptGates:
    """Give every routed layer a router of kind `prompt`, in place.

    Args:
        model: with its experts inserted; routers that it has are replaced
        texts: token ids of texts that belong to no expert, in the chat template or not
        options: how it routes; with `null`, the base answers a prompt on which no expert stands out
            more than on any of the texts
        template: the tokens around every prompt, which do not count
        scratch: a folder for hidden states that do not fit in memory
        progress: called with (layers done, layers in all)

    Raises:
        TrainingError: there are too few texts, or an input holds NaN or infinity.
        SweepError: the model cannot be run layer by layer.
    """
    if len(texts) < LEAST_TEXTS:
        raise TrainingError(
            f"{len(texts)} background texts are too few to compare prompts with; give"
            f" {LEAST_TEXTS} or more"
        )
    sequences = [_labelled(tuple(ids), template) for ids in texts]
    batches = list(batched(sequences, set(), input_device(model)))
    chosen = [batch.labels != UNLABELLED for batch in batches]
    counts = torch.cat([mask.sum(1) for mask in chosen]).cpu()
    text_of = torch.repeat_interleave(torch.arange(len(counts)), counts)  # [T]
    layers = routed_layers(model)
    num_experts = len(next(iter(layers.values())).stack.ranks)
    rows: dict[str, Tensor] = {}
    offsets: dict[str, Tensor] = {}
    sizes = torch.zeros(len(texts), num_experts, dtype=torch.float32)
    num_modules = torch.zeros(num_experts, dtype=torch.float32)
    with swept(model):
        sweep = Sweep(model, [(b.input_ids, b.attention_mask) for b in batches], scratch=scratch)

        def measure(index: int, paths: Sequence[str]) -> None:
            inputs = zip(sweep.inputs(index, paths[0]), chosen, strict=True)
            x = torch.cat([part[mask].float() for part, mask in inputs])  # [T, IN]
            if not x.isfinite().all():
                raise TrainingError(
                    f"{paths[0]}: its inputs hold NaN or infinity; the base overflows in"
                    f" {model.dtype}, load it in another dtype"
                )
            mean = x.mean(0)
            whitening = RidgeWhitening.of(x - mean)
            for path in paths:
                router = _router_of(layers[path].stack, whitening, mean, options)
                rows[path], offsets[path] = router.rows.cpu(), router.offset.cpu()
                sizes.add_(_means(router.sizes(x).cpu(), text_of, len(texts)))
                num_modules.add_(torch.tensor(router.has))

        sweep.run(measure, progress)
    standard = standard_of(sizes / num_modules.clamp_min(1), null=options.null)
    gates = PromptGates(rows, offsets, standard, template)
    insert_prompt_routers(model, gates, options)
    return gates


def _router_of(
    stack: ExpertStack, whitening: RidgeWhitening, mean: Tensor, options: RouterOptions
) -> PromptRouter:
    """The router of a module, by the whitening and the mean [IN] of its inputs on the texts."""
    folded = Norm(stack, RouterOptions("norm", 1, 1.0)).folded
    # in 16 bits, since they are as large as the experts; the offset is that of the rounded rows
    rows = whitening.of_rows(folded).bfloat16()
    return PromptRouter(rows, rows.to(mean.dtype) @ mean, stack, options, HeldChoice())


class RidgeWhitening(NamedTuple):
    """(Σ + λ I)^-½ of the inputs at one point, which several modules may have.

    λ is `RIDGE` times the mean of Σ's diagonal.
    """

    directions: Tensor
    """[IN, N] in which the inputs vary, float64"""
    inside: Tensor
    """[N] the factor of each direction, less `outside`"""
    outside: Tensor
    """[] the factor of all others: there the inputs do not vary, and only the ridge is left"""

    @classmethod
    def of(cls, centred: Tensor) -> Self:
        """From inputs [T, IN] less their mean, with Σ their covariance.

        The directions are the eigenvectors of Σ, or come from those of the Gram matrix of tokens,
        whichever is smaller.
        """
        x = centred.double()
        num_tokens, num_inputs = x.shape
        x = x / max(1, num_tokens - 1) ** 0.5
        ridge = RIDGE * (x.square().sum() / num_inputs).clamp_min(LEAST)
        if num_inputs <= num_tokens:
            variances, directions = torch.linalg.eigh(x.T @ x)
        else:
            variances, of_tokens = torch.linalg.eigh(x @ x.T)
            lengths = torch.where(variances > LEAST * variances[-1], variances.rsqrt(), 0.0)
            directions = x.T @ (of_tokens * lengths)
        outside = ridge.rsqrt()
        return cls(directions, (variances.clamp_min(0) + ridge).rsqrt() - outside, outside)

    def of_rows(self, rows: Tensor) -> Tensor:
        """Rows [R, IN] times (Σ + λ I)^-½, [R, IN]."""
        wide, (directions, inside, outside) = rows.double(), self
        return (wide * outside + (wide @ directions * inside) @ directions.T).to(rows.dtype)


def standard_of(sizes: Tensor, *, null: bool) -> Tensor:
    """Intercept, slope and deviation of each choice, from background texts, [3, C].

    The size of an expert is compared with its expected size, given those of the other experts: a
    line is fitted to its sizes [N, E] over the mean of the others. With `null` the last choice is
    the base, with a constant logit: the largest of any expert on any of the texts.
    """
    others = mean_of_others(sizes)
    centred, apart = sizes - sizes.mean(0), others - others.mean(0)
    slope = (centred * apart).sum(0) / apart.square().sum(0).clamp_min(LEAST)
    intercept = sizes.mean(0) - slope * others.mean(0)
    residual = sizes - intercept - slope * others
    deviation = residual.std(0).clamp_min(1e-6)
    standard = torch.stack([intercept, slope, deviation])
    if not null:
        return standard
    largest = (residual / deviation).max()
    base = torch.stack([-largest, torch.zeros(()), torch.ones(())])
    return torch.cat([standard, base.unsqueeze(1)], 1)


def _labelled(ids: tuple[int, ...], template: Template) -> LabelledSequence:
    """The ids, with the label 0 between the template's opening and closing.

    If the text has no template, or nothing between the two, all ids have the label 0.
    """
    start, end = len(template.opening), len(template.closing)
    between = ids[:start] == template.opening and ids[len(ids) - end :] == template.closing
    if not between or len(ids) <= start + end:
        start = end = 0
    own = range(start, len(ids) - end)
    return LabelledSequence(ids, tuple(0 if i in own else UNLABELLED for i in range(len(ids))))


def _means(sizes: Tensor, text_of: Tensor, num_texts: int) -> Tensor:
    """The mean of sizes [T, E] over the tokens of each text, [N, E]."""
    sums = torch.zeros(num_texts, sizes.shape[1]).index_add(0, text_of, sizes.float())
    return sums / torch.bincount(text_of, minlength=num_texts).unsqueeze(1)
