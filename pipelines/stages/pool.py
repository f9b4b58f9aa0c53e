"""The stage that deals a pool: experts without examples get theirs from prompts without labels."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from meteora.artifacts import PoolBuild
from pipelines.data.claims import shares_of, write_claims
from pipelines.data.pool import deal
from pipelines.stages.open_model import is_spread, opened, tokenizer_of_gates
from pipelines.workspace.console import bar, say
from pipelines.workspace.machine import choose_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from meteora.artifacts import BuiltBase
    from pipelines.data.claims import Claim
    from pipelines.planning.plan import Plan
    from pipelines.workspace.context import RunContext


def deal_pool(work: RunContext, plan: Plan, built: BuiltBase) -> None:
    """Deal the plan's pool, and record how; say what each expert got."""
    spec = plan.pool
    if spec is None or work.holds(spec.id):
        return
    started = time.perf_counter()
    device_map = "auto" if is_spread(work, plan) else None
    with opened(work, plan, built, None, device_map) as (model, tokenizer):
        claims = deal(
            model,
            tokenizer_of_gates(tokenizer, spec.template),
            plan.to_deal,
            plan.fused.names,
            limit=spec.examples_per_expert,
            seed=spec.seed,
            bar=bar,
        )
    labels = work.ledger.blobs.put_bytes(write_claims(claims).encode())
    made = PoolBuild(
        spec=spec,
        labels_sha256=labels,
        shares=shares_of(claims, plan.fused.names),
        wall_seconds=time.perf_counter() - started,
        device=choose_device(),
    )
    work.ledger.record_artifact(
        spec, weights_sha256=labels, built=made, blobs=[labels], run_id=work.run_id
    )
    _say(made, claims)


def _say(made: PoolBuild, claims: Sequence[Claim]) -> None:
    given = ", ".join(f"{share.num_prompts} to {share.expert or 'nobody'}" for share in made.shares)
    say(f"of {len(claims):,} prompts of the pool: {given}")
    if unread := sum(claim.cluster < 0 for claim in claims):
        say(f"{unread:,} of them do not fit into the base's context, and were not read", "note")
