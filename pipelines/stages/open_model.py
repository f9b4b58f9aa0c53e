"""A plan as a loaded model: the base with the experts, from the store."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from meteora.artifacts import WITH_GATES, AdapterSpec, ArtifactId, BuiltBase, FusedSpec, RouterBuild
from meteora.base import loading
from meteora.base.placement import placed
from meteora.base.shapes import fingerprint, shape_of
from meteora.checkpoint.manifest import EXPERTS, GATES, BaseEntry, ExpertEntry, Manifest
from meteora.checkpoint.stack import module_entries
from meteora.model.fused import check_base, insert_experts, insert_routers
from meteora.routing.expert_cache import ExpertCache
from pipelines.planning.estimate import held_bytes
from pipelines.planning.fit_estimate import reads_by_layer
from pipelines.workspace.bases import require_sound
from pipelines.workspace.console import say
from pipelines.workspace.machine import choose_device, is_too_large, memory_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.admission.experts import Expert
    from pipelines.planning.plan import Plan
    from pipelines.workspace.context import RunContext


def describe(work: RunContext, plan: Plan, gates: RouterBuild | None) -> Manifest:
    """The manifest of a plan's checkpoint; its files are experts and gates."""
    base = BuiltBase.from_dict(work.ledger.built(plan.base.id) or {})
    files = {EXPERTS: str(work.ledger.weights_of(plan.fused.id))}
    made: dict[str, Any] = {}
    if gates is not None and plan.router.router in WITH_GATES:
        files[GATES] = gates.weights_sha256
        made = {
            "method": plan.router.method,
            "examples_sha256": plan.router.examples_sha256,
            "seed": plan.router.seed,
            "num_tokens": gates.num_tokens,
            "heldout_accuracy": gates.heldout_accuracy,
        }
        further = {
            "pool_id": plan.router.pool_id,
            "card_examples": gates.card_examples,
            "hub_examples": gates.hub_examples,
            "example_licences": gates.example_licences,
            "composites": [
                {"n": n, "num_fewshot": solved} if solved else n
                for n, solved in plan.router.mixed_prompts
            ],
            "crossed": plan.router.crossed,
            "not_crossed": gates.not_crossed,
            "conversations": plan.router.conversations,
            "system_prompts": plan.router.system_prompts,
            "template": "plain" if plan.router.template == "plain" else "",
            "joint": plan.router.joint and plan.router.joint.to_dict(),
        }
        made |= {name: value for name, value in further.items() if value}
    return Manifest(
        base=BaseEntry(
            plan.base.base_model,
            plan.base.base_revision,
            base.fingerprint,
            base.licence,
            plan.base.quantise,
        ),
        experts=tuple(map(entry_of, plan.experts)),
        modules=module_entries([expert.adapter.spec for expert in plan.experts]),
        router=plan.router.options,
        gates=made,
        fused_id=plan.fused.id,
        router_id=plan.router.id,
        files=files,
    )


def entry_of(expert: Expert) -> ExpertEntry:
    return ExpertEntry(
        name=expert.name,
        adapter_id=expert.adapter.spec.id,
        source="/".join(filter(None, (expert.ref.repo_id, expert.ref.subfolder))),
        revision=expert.ref.revision,
        weights_sha256=expert.adapter.spec.weights_sha256,
        licence=expert.licence,
        r=_ranks(expert.adapter.spec),
    )


def stack_in(manifest: Manifest) -> FusedSpec:
    base_id = manifest.base.spec.id
    adapter_ids = tuple(ArtifactId(entry.adapter_id) for entry in manifest.experts)
    stack = FusedSpec(base_id, tuple(manifest.names), adapter_ids)
    if stack.id == manifest.fused_id:  # earlier versions named no bare modules
        return stack
    bare = (path for path, entry in manifest.modules.items() if not any(entry.ranks))
    return replace(stack, bare=tuple(bare))


def _ranks(spec: AdapterSpec) -> str:
    ranks = [module.r for module in spec.modules]
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}–{high}"


@contextmanager
def opened(
    work: RunContext,
    plan: Plan,
    device_map: dict[str, str] | str | None = None,
    *,
    gates: RouterBuild | None = None,
) -> Generator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """The base with the plan's experts in it, and with its router if `gates` are given.

    Without a device map the model is on one device.
    """
    require_sound(work.ledger, plan.base)
    if device_map is None and plan.base.quantise:  # quantised weights are made on their device
        device_map = {"": choose_device()}
    with work.scratch() as scratch:
        options = {} if device_map is None else placed(device_map, offload_folder=scratch)
        manifest = describe(work, plan, gates)
        for name, sha256 in manifest.files.items():
            (scratch / name).symlink_to(work.ledger.blobs.path_of(sha256).absolute())
        model, tokenizer = loading.load_folder(
            work.base_folder(plan.base), options=options, quantise=plan.base.quantise
        )
        check_base(manifest, fingerprint(model.config, tokenizer), scratch)
        budget = work.recipe.expert_cache_bytes
        cache = None if budget is None else ExpertCache(budget)
        insert_experts(model, scratch, manifest, cache=cache)
        if gates is not None:
            insert_routers(model, scratch, manifest)
        if device_map is None:
            # plain nn.Module.to: the annotation of transformers' own hides it behind a decorator
            torch.nn.Module.to(model, choose_device())
        yield model, tokenizer


def map_to_fit(work: RunContext, plan: Plan) -> dict[str, str] | None:
    """The device map of a model while its gates are fitted; None for one device.

    A fit goes through the model layer by layer, so one layer at a time in memory is enough.
    """
    if not reads_by_layer(work.recipe, _num_bytes(work, plan), memory_bytes()):
        return None
    say("the base is read from the disk one layer at a time")
    return loading.layers_on_disk(work.base_folder(plan.base), choose_device())


def map_to_divide(work: RunContext, plan: Plan) -> dict[str, str] | None:
    """The device map of a model in each of several processes; None if each holds it whole.

    Processes that divide the base read it one layer at a time, so none ever holds all of it.
    """
    if not getattr(work.recipe.gates, "sharded", False):
        return None
    return loading.layers_on_disk(work.base_folder(plan.base), choose_device())


def is_spread(work: RunContext, plan: Plan) -> bool:
    """Whether base and experts are too large for one device; a quantised base is never spread."""
    return not plan.base.quantise and is_too_large(_num_bytes(work, plan), memory_bytes())


def _num_bytes(work: RunContext, plan: Plan) -> float:
    """The bytes of base and experts on the device."""
    experts = work.ledger.blobs.path_of(str(work.ledger.weights_of(plan.fused.id))).stat().st_size
    held = held_bytes(work.recipe, experts)
    return shape_of(work.base_folder(plan.base)).num_bytes + held


def tokenizer_of_gates(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> PreTrainedTokenizerBase:
    """The tokenizer for the prompts that gates are fitted to; `plain` for no chat template."""
    if template != "plain":
        return tokenizer
    plain = copy.copy(tokenizer)
    plain.chat_template = None
    return plain
