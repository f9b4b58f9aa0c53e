"""The routed layer: a frozen projection, a stack of experts, and a router.

    before   q_proj: Linear(IN, OUT)
    after    q_proj: MoELoRALinear(that Linear, ExpertStack(A [R, IN], B [OUT, R], …), router)

`RoutedExperts` is the same without the projection, for programs that compute it themselves.

The layer takes and returns the same tensors as the projection, so the base model's own code runs
unchanged: caches, padding, batches and beams included. Hooks record a router's decisions.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from meteora.artifacts import MeteoraError
from meteora.base.placement import device_of, held, is_offloaded
from meteora.kernels import dispatch, gather_grouped, reference
from meteora.kernels.addmm import Plain, experts_dtype, is_autocast, weight_of
from meteora.kernels.dispatch import KernelName
from meteora.kernels.stack import ExpertStack
from meteora.routing.expert_cache import ExpertCache
from meteora.routing.routers import Router
from meteora.routing.shared_input import Share, SharedMatmul


class RoutedExperts(nn.Module):
    """The experts of one projection and the router that chooses among them.

    The adapters are buffers and no parameters, so that no optimiser changes them.
    """

    def __init__(self, stack: ExpertStack) -> None:
        super().__init__()
        self.stack = stack
        self.cache: ExpertCache | None = None
        """Copies the chosen experts of a mapped stack to the device of the stack's tables."""
        self._key = object()
        """Identifies this layer in the cache, which other layers may share."""
        self.router: Router | None
        self.register_module("router", None)
        self._before: dict[object, Router | None] = {}
        """The router before each open block of `routed_by`, the oldest block first."""
        self.kernel: KernelName | None = None
        """The kernel that computes the experts; None: the fastest for the tokens."""
        self.shared: Share | None = None
        """The first matmul, if other layers have the same input and gate."""

    @property
    def num_choices(self) -> int:
        """C, the width of the router's logits."""
        return self.stack.num_choices

    @property
    def device(self) -> torch.device:
        """The device on which it computes."""
        return self.stack.segments.device

    @property
    def looks_ahead(self) -> bool:
        """Whether its router decides by whole prompts; not where an expert is forced."""
        return self.router is not None and not self.router.is_causal

    @property
    def is_lent(self) -> bool:
        """Whether a block of `routed_by` is open."""
        return bool(self._before)

    def lend(self, block: object, router: Router | None) -> None:
        """Use this router until `take_back` is called for the same block."""
        self._before[block], self.router = self.router, router

    def take_back(self, block: object) -> None:
        """End a block; blocks may end in any order, such as those of two generators.

        The newest open block routes; after the last one the layer's own router does.
        """
        blocks = list(self._before)
        if block not in blocks:  # it failed before it came to this layer
            return
        before, later = self._before.pop(block), blocks[blocks.index(block) + 1 :]
        if later:
            self._before[later[0]] = before
        else:
            self.router = before

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add the update of the router's choices for x [T, IN] to y [T, OUT] in place.

        Raises:
            RuntimeError: there is no router.
        """
        if self.router is None:
            raise RuntimeError("a layer without a router has no choice of experts to add")
        weights, experts = self.router.choose(x)
        self._delta(x, x, weights, experts, y)
        self.router.add_offsets(weights, experts, y)

    def _delta(
        self, x: Tensor, tokens: Tensor, weights: Tensor, experts: Tensor, add_to: Tensor | None
    ) -> Tensor:
        """The update of the chosen experts, [T, OUT]; it is added to `add_to` in place, if given.

        Args:
            x: the input of the layer
            tokens: the same as [T, IN]
        """
        tokens = tokens.to(self._dtype)
        if self.cache is not None:
            return self._delta_from_cache(self.cache, tokens, weights, experts, add_to)
        kernel, share = self.kernel, self._usable_share()
        if share is not None:
            if share.place == 0:
                kernel = kernel or self._fastest_kernel(tokens.dtype, experts)
                share.matmul.compute(x, tokens, weights, experts, kernel)
            if (product := share.matmul.take(share.place, x, experts)) is not None:
                return product.expand(self.stack.b, add_to)
        compute = dispatch.find_kernel(kernel or self._fastest_kernel(tokens.dtype, experts))
        return compute(tokens, self.stack, weights, experts, add_to=add_to)

    def _usable_share(self) -> Share | None:
        """The share in the first matmul; None if this layer computes A x itself in this call."""
        share = self.shared
        if share is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        leads = self.router is not None and self.router.leads
        return share if share.place or leads else None

    @property
    def _dtype(self) -> torch.dtype:
        """The dtype in which the experts compute."""
        return self.stack.a.dtype

    def _delta_from_cache(
        self,
        cache: ExpertCache,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        add_to: Tensor | None,
    ) -> Tensor:
        """As `_delta`, by the grouped kernel; a missing expert is copied to the device."""
        stack, blends = self.stack, self.stack.blends

        def pair(choice: int) -> tuple[Tensor, Tensor]:
            def load() -> tuple[Tensor, Tensor]:
                a, b = stack.pair(choice)
                with torch.inference_mode(mode=False):  # gates may be trained later
                    b = b.T.to(x.device, x.dtype, copy=True).contiguous()
                    return a.to(x.device, x.dtype, copy=True), b.T

            # a blend is all experts of the layer, so many single ones would have to leave for it
            key = self._key, choice, x.device, x.dtype
            return cache.fetch(key, load, may_evict=choice not in blends)

        return gather_grouped.add_grouped(x, stack, weights, experts, add_to, pair)

    def _fastest_kernel(self, dtype: torch.dtype, experts: Tensor) -> KernelName:
        if torch.compiler.is_compiling():
            return "dense"  # one graph for all choices
        num_tokens, top_k = experts.shape
        sizes, device = self.stack.sizes, experts.device.type
        if device != "cpu" or num_tokens == 1:
            return dispatch.choose_kernel(num_tokens, top_k, sizes, dtype, device)
        # `grouped` is fastest with few experts; if it loses even then, they need no counting
        kernel = dispatch.choose_kernel(num_tokens, top_k, sizes, dtype, device, top_k)
        if kernel != "grouped":
            return kernel
        counts = torch.bincount(experts.flatten(), minlength=sizes.num_choices)
        num_chosen = int(counts.count_nonzero())
        return dispatch.choose_kernel(num_tokens, top_k, sizes, dtype, device, num_chosen)


class MoELoRALinear(RoutedExperts):
    """y = projection(x) + `reference.lora_delta_loop` of x + the router's offsets, if it has any.

    Without a router (`router = None`) the layer is the bare projection. For the precision in 16
    bits see `addmm`.
    """

    def __init__(
        self,
        projection: nn.Module,
        stack: ExpertStack,
        router: Router | None = None,
        *,
        cache: ExpertCache | None = None,
    ) -> None:
        """Wrap `projection`, [..., IN] to [..., OUT]; with a cache, `stack` is a mapped one."""
        super().__init__(stack if cache is None else stack.to(device_of(projection)))
        self.projection, self.router, self.cache = projection, router, cache

    @property
    def weight(self) -> Tensor:
        """The projection's own weight: base models ask for its dtype and device."""
        return weight_of(self.projection)

    @property
    def bias(self) -> Tensor | None:
        """The projection's own bias: Mamba's model reads that of `dt_proj`."""
        return getattr(self.projection, "bias", None)

    @contextmanager
    def whole(self) -> Generator[None]:
        """A context in which all experts are on the device, not only those that a cache holds."""
        cache, stack = self.cache, self.stack
        if cache is not None:
            self.cache, self.stack = None, stack.whole(self.device, self._dtype)
        try:
            yield
        finally:
            self.cache, self.stack = cache, stack

    def forward(self, x: Tensor) -> Tensor:
        # torch finds a part that is asked for as an attribute by a call of Python
        parts: dict[str, Any] = self._modules
        projection, router = parts["projection"], parts["router"]
        if router is None or router.only_reads(x):
            return projection(x)
        if self._has_short_way(x, router):
            return self._one_token(x, router)
        if not is_offloaded(projection):
            return self._routed(x, router)
        with held(projection):  # so that 16-bit sums are rounded as without offloading
            return self._routed(x, router)

    def _has_short_way(self, x: Tensor, router: Router) -> bool:
        """Whether x [..., IN] is one token that `_one_token` may compute, and computes fastest."""
        if torch.compiler.is_compiling() or x.numel() != x.shape[-1] or torch.is_grad_enabled():
            return False
        if self.kernel is not None or self.cache is not None or x.dtype is not torch.float32:
            return False
        if not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return False
        top_k = router.options.top_k
        if top_k == 1:
            return True
        return dispatch.choose_kernel(1, top_k, self.stack.sizes, x.dtype, "cpu") == "grouped"

    def _one_token(self, x: Tensor, router: Router) -> Tensor:
        """As `_routed` for one token, in a third of the calls.

        While decoding these take more time than the arithmetic: the weights of the base have just
        passed through the processor's cache, so each call reads its code and data anew.
        """
        y, stack, offsets = self.projection(x), self.stack, router.offsets
        if y.dtype is not x.dtype or stack.a.dtype is not x.dtype:
            return self._routed(x, router)
        token, out = x.view(1, -1), y.view(1, -1)
        for choice, weight in router.choose_for_one(token):
            if (update := stack.update(choice)) is not None:
                update.add_for(token, weight, out)
            if offsets is not None:
                out.add_(offsets[choice], alpha=weight)
        return y

    def _routed(self, x: Tensor, router: Router) -> Tensor:
        projection = self.projection
        plain = Plain.of(projection, x)
        tokens = x.reshape(-1, x.shape[-1])  # [T, IN]
        with _own_precision(x):
            weights, experts = router.choose(tokens)
        if plain is not None:
            delta = self._delta(x, tokens, weights, experts, self._start(tokens, plain))
            out = reference.add_projected(delta, tokens, plain.weight)
            router.add_offsets(weights, experts, out)
            return out.view(*x.shape[:-1], out.shape[-1])
        y = projection(x)
        rows = y.reshape(-1, y.shape[-1])
        with _own_precision(x):
            if y.requires_grad:
                out = rows + self._delta(x, tokens, weights, experts, None).to(y.dtype)
            else:
                # y needs no gradient, but bitsandbytes returns a view that autograd guards
                out = self._delta(x, tokens, weights, experts, rows.detach())
            router.add_offsets(weights, experts, out)
        return out.view(y.shape)

    def _start(self, tokens: Tensor, plain: Plain) -> Tensor | None:
        """The tensor [T, OUT] to which the experts' sum is added; None: a new one.

        The projection is added afterwards.
        """
        if plain.bias is not None:
            return plain.bias.expand(len(tokens), -1).clone()
        if self._dtype != tokens.dtype:  # the experts' sum is rounded to 16 bits
            return tokens.new_zeros(len(tokens), len(self.stack.b))
        return None

    @property
    def _dtype(self) -> torch.dtype:
        if self.cache is None:
            return self.stack.a.dtype
        stack = self.stack
        return experts_dtype(stack.a.dtype, self.weight.dtype, stack.largest_scaling)


def _own_precision(x: Tensor) -> AbstractContextManager[object]:
    """Turn autocast off, so that gates and experts keep their dtypes in in-place sums."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x.device) else nullcontext()


def share_first_matmul(layers: Sequence[RoutedExperts]) -> None:
    """Let layers that are called with one input compute A x together, if no gradient is needed.

    Args:
        layers: in the order of their calls; all but the first follow its gate
    """
    if any(layer.cache is not None for layer in layers):
        return
    matmul = SharedMatmul(layers)
    for place, layer in enumerate(layers):
        layer.shared = Share(matmul, place)


def routed_layers(model: nn.Module) -> dict[str, MoELoRALinear]:
    """Every routed layer by its module path, in the order of the model."""
    return {p: m for p, m in model.named_modules() if isinstance(m, MoELoRALinear)}


def require_a_row_of_each_token(path: str, x: Tensor, num_tokens: int) -> None:
    """Refuse the input [..., IN] of a module with other rows: a gate decides for each token.

    CPM-Ant has rows of a prompt of its own, and ProphetNet those of several next tokens.

    Raises:
        MeteoraError: there are more rows, or fewer.
    """
    num_rows = x.numel() // x.shape[-1]
    if num_rows != num_tokens:
        raise MeteoraError(
            f"the base asks {path} for {num_rows:,} rows of {num_tokens:,} tokens, and a gate"
            " decides for one row a token; use a router without gates"
        )


@contextmanager
def routed_by(model: nn.Module, make: Callable[[MoELoRALinear], Router | None]) -> Generator[None]:
    """A context in which every routed layer has another router; with None it is the projection."""
    layers, block = routed_layers(model).values(), object()
    try:
        for layer in layers:
            layer.lend(block, make(layer))
        yield
    finally:
        for layer in layers:
            layer.take_back(block)
