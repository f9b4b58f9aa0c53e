"""Put gates into a model, and read them from it; which module follows which gate."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from meteora.artifacts import MeteoraError, RouterOptions
from meteora.artifacts.routers import ONE_INPUT
from meteora.base.chat_template import Template
from meteora.checkpoint.tensors import Gates
from meteora.routing.layer import RoutedExperts, routed_layers, share_first_matmul
from meteora.routing.passes import Watcher, set_watcher, watcher_of
from meteora.routing.prompt_opening import PromptOpening
from meteora.routing.prompt_router import PromptRouter
from meteora.routing.routers import Decision, Follower, Gate, PassState, QuestionReader
from meteora.routing.turns import TurnChoice, Turns
from meteora.routing.weight_scores import StandIn, scorer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class UndecidedError(MeteoraError):
    """A module has neither a gate nor one before it to follow."""


class CheckpointingError(MeteoraError):
    """A layer that follows another layer's gate cannot use this kind of gradient checkpointing."""


def insert_gates(model: PreTrainedModel, gates: Gates, options: RouterOptions) -> None:
    """Give every routed layer its gate, or the decision of the gate that it follows."""
    reader = watch_prompts(model, gates.template, options)
    layers, decisions = routed_layers(model), new_decisions(gates)
    for path, layer in layers.items():
        give_router(layer, path, gates, options, decisions, reader)
    if options.share in ONE_INPUT:
        share_first_matmuls(layers, gates.follows)


def new_decisions(gates: Gates) -> dict[str, Decision]:
    """A new `Decision` for every gate that other modules follow, by the gate's module path."""
    return {leader: Decision() for leader in gates.follows.values()}


def give_router(
    layer: RoutedExperts,
    path: str,
    gates: Gates,
    options: RouterOptions,
    decisions: Mapping[str, Decision],
    reader: QuestionReader | None,
) -> None:
    """Route the layer at `path` by its own gate, or by the decision of the gate it follows."""
    if path in gates.follows:
        layer.router = Follower(decisions[gates.follows[path]], layer.num_choices, options)
    else:
        stand_in = None
        if gates.without_examples:
            standard = gates.stand_ins[path]
            stand_in = StandIn(scorer(options, layer), list(gates.without_examples), standard)
        give_gate(layer, *gates.own[path], options, reader, decisions.get(path), stand_in)
    give_offsets(layer, gates.offsets.get(path))


def share_first_matmuls(layers: Mapping[str, RoutedExperts], follows: Mapping[str, str]) -> None:
    """Let each gate's layer compute A x for those that follow it and read the same input.

    A follower may have another input than its gate, if it came with an expert that was added later.

    Args:
        layers: by module path, in the order of their calls
        follows: module path to that of the layer whose gate it follows
    """
    points: dict[str, list[RoutedExperts]] = {}
    for path, layer in layers.items():
        leader = layers.get(follows.get(path, ""))
        if leader is not None and layer.stack.sizes.num_in == leader.stack.sizes.num_in:
            points.setdefault(follows[path], [leader]).append(layer)
    for point in points.values():
        share_first_matmul(point)


def watch_prompts(
    model: PreTrainedModel, template: Template | None, options: RouterOptions
) -> PromptOpening | Turns | None:
    """Set a watcher with which gates decide by whole questions: for turns, or for the opening.

    None if each token is routed by itself; nothing watches the model then.
    """
    watcher: PromptOpening | Turns | None = None
    if options.by_turns:  # even without a template: the first pass is then the question
        watcher = Turns(template or Template())
    elif template is not None and template.opening:
        watcher = PromptOpening(template)
    set_watcher(model, watcher)
    return watcher


@contextmanager
def old_routers_after_error(model: PreTrainedModel) -> Generator[None]:
    """A context in which routers may be replaced; after an error the old ones are put back.

    Raises:
        MeteoraError: the routers are replaced already, and would come back over the new ones.
    """
    before = {layer: layer.router for layer in routed_layers(model).values()}
    if any(layer.is_lent for layer in before):
        raise MeteoraError(
            "the routers are replaced, as in force_expert; fit the model outside of that block"
        )
    watcher = watcher_of(model)
    try:
        yield
    except BaseException:
        for layer, router in before.items():
            layer.router = router
        set_watcher(model, watcher)
        raise


def give_gate(
    layer: RoutedExperts,
    weight: Tensor,
    bias: Tensor,
    options: RouterOptions,
    reader: QuestionReader | None,
    decision: Decision | None,
    stand_in: StandIn | None,
) -> None:
    """Route a layer by G [C, IN] and c [C].

    Args:
        decision: receives the gate's decision, for the layers that follow it
        stand_in: computes the logits of experts without examples
    """
    with torch.inference_mode(mode=False):  # a model that is loaded in it may be trained later
        gate = Gate(
            weight.clone(),
            bias.clone(),
            options,
            by_question=None if reader is None else reader.at_gate(),
            decision=decision,
            stand_in=stand_in,
        )
        layer.router = gate.to(layer.device).requires_grad_(requires_grad=False)


def give_offsets(layer: RoutedExperts, offsets: Tensor | None) -> None:
    """Have the router of a layer add offsets [C, OUT] of its choices, if there are any."""
    if layer.router is not None and offsets is not None:
        layer.router.offsets = offsets.to(layer.device)


def gates_in(model: PreTrainedModel) -> dict[str, Gate]:
    """Every gate by its module's path; modules that use another module's gate have none."""
    routers = {path: layer.router for path, layer in routed_layers(model).items()}
    return {path: router for path, router in routers.items() if isinstance(router, Gate)}


def states_read_by(layers: nn.Module) -> list[PassState]:
    """The states that were written before these layers ran, and that their routers read.

    A recomputation in a backward pass has to see the same.
    """
    routers = [layer.router for layer in routed_layers(layers).values()]
    gates = [router for router in routers if isinstance(router, Gate)]
    followed: list[PassState] = [r.decision for r in routers if isinstance(r, Follower)]
    followed += [router.held for router in routers if isinstance(router, PromptRouter)]
    rules = [gate.by_question for gate in gates if gate.by_question is not None]
    watchers = [rule.turns if isinstance(rule, TurnChoice) else rule for rule in rules]
    read = [*followed, *(one.now for one in watchers if isinstance(one, Watcher))]
    own = {id(gate.decision) for gate in gates}
    return list({id(one): one for one in read if id(one) not in own}.values())


def as_in_this_pass(layers: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a call of layers for gradient checkpointing: it then always has this pass's routes."""
    known = [(one, dict(vars(one))) for one in states_read_by(layers)]
    calls = count()

    def run_again(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if not next(calls):
            return run(*args, **kwargs)
        later = [(one, dict(vars(one))) for one, _ in known]
        try:
            for one, state in known:
                vars(one).update(state)
            return run(*args, **kwargs)
        finally:
            for one, state in later:
                vars(one).clear()
                vars(one).update(state)

    return run_again


def route_again_as_before(model: PreTrainedModel) -> None:
    """Make transformers' gradient checkpointing route as `as_in_this_pass` does."""
    vars(model)["_set_gradient_checkpointing"] = partial(_set_gradient_checkpointing, model)


def _set_gradient_checkpointing(model: PreTrainedModel, **options: Any) -> None:  # noqa: ANN401
    name = "gradient_checkpointing_func"
    if name in options:
        options[name] = partial(_checkpointed, options[name])
    type(model)._set_gradient_checkpointing(model, **options)


def _checkpointed(
    checkpoint: Callable[..., Any],
    run: Callable[..., Any],
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Call transformers' `checkpoint` for a layer, which is the first argument or owner of `run`.

    Raises:
        CheckpointingError: gradients would not reach a gate that the layer follows.
    """
    owner = getattr(getattr(run, "func", run), "__self__", None)
    layer = next(iter(getattr(run, "args", ())), owner)
    if not isinstance(layer, nn.Module):
        return checkpoint(run, *args, **kwargs)
    follows = any(isinstance(one, Decision) for one in states_read_by(layer))
    routers = [one.router for one in routed_layers(layer).values()]
    weighs = follows and any(isinstance(r, Follower) and r.options.top_k > 1 for r in routers)
    reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant")
    if weighs and reentrant and torch.is_grad_enabled():
        raise CheckpointingError(
            "gradient checkpointing with use_reentrant=True gives wrong gradients where a layer"
            " follows the gate of another; enable it with use_reentrant=False"
        )
    return checkpoint(as_in_this_pass(layer, run), *args, **kwargs)


def gates_of(model: PreTrainedModel) -> Gates:
    """Every gate of a model, on the CPU, and the modules that follow it."""
    gates = gates_in(model)
    routers = {path: layer.router for path, layer in routed_layers(model).items()}
    leaders = {id(gate.decision): path for path, gate in gates.items()}
    stand_ins = {p: g.stand_in for p, g in gates.items() if isinstance(g.stand_in, StandIn)}
    templates = [g.by_question.template for g in gates.values() if g.by_question is not None]
    return Gates(
        own={p: (g.weight.detach().cpu(), g.bias.detach().cpu()) for p, g in gates.items()},
        follows={
            path: leaders[id(router.decision)]
            for path, router in routers.items()
            if isinstance(router, Follower)
        },
        template=templates[0] if templates else Template(),
        stand_ins={path: stand_in.standard.cpu() for path, stand_in in stand_ins.items()},
        without_examples=next((tuple(one.experts) for one in stand_ins.values()), ()),
        offsets={
            path: router.offsets.cpu()
            for path, router in routers.items()
            if router is not None and router.offsets is not None
        },
    )


class Sharing:
    """Names, during a sweep, the gate that decides for the next modules: see `RouterOptions.share`.

    With `token` one gate decides for all modules from a third of the depth on; those before it have
    gates of their own.
    """

    def __init__(self, share: str, num_layers: int) -> None:
        self.share = share
        self.decides_at = num_layers // 3
        self._last: tuple[int, Decision] | None = None

    def decided(self, index: int) -> Decision | None:
        """The decision that a point of layer `index` follows; None if it needs its own gate."""
        if self._last is None:
            return None
        at, decision = self._last
        if self.share == "layer":
            return decision if at == index else None
        return decision if self.share == "token" and at >= self.decides_at else None

    def last(self, path: str) -> Decision:
        """The last decision before the module at `path`, which has no gate.

        Raises:
            UndecidedError: there is no earlier gate.
        """
        if self._last is None:
            raise UndecidedError(
                f"{path}: no gate decides before it, and none can be fitted for it alone; fit the"
                " gates of all experts together"
            )
        return self._last[1]

    def new(self, index: int) -> Decision:
        """The decision of a gate that is fitted at layer `index`."""
        self._last = index, Decision()
        return self._last[1]
