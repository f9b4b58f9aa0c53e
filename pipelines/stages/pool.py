"""The stage that divides a pool: experts without examples take theirs from prompts without labels.

Without a pool the experts whose cards name no examples write the prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from meteora import __version__
from meteora.artifacts import PoolBuild, PoolSpec, canonical_sha256
from meteora.untrusted.findings import MOST_NAMED, counted, listed
from pipelines.admission.own_prompts import write_prompts
from pipelines.data.claims import Claim, describe_shares, shares_of, write_claims
from pipelines.data.pool import divide
from pipelines.evaluation.resume import open_log
from pipelines.stages.open_model import is_spread, opened, tokenizer_of_gates
from pipelines.workspace.console import bar, say
from pipelines.workspace.machine import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipelines.data.pool import Answers
    from pipelines.planning.plan import Plan
    from pipelines.workspace.context import RunContext


def divide_pool(work: RunContext, plan: Plan) -> None:
    """Divide the plan's pool, record it, and print the number of each expert's prompts.

    After a stop only the experts that had not answered all their prompts are asked again.
    """
    spec = plan.pool
    if spec is None or work.holds(spec.id):
        return
    started = time.perf_counter()
    for name, why in [*plan.no_card_examples.items()][:MOST_NAMED]:
        say(f"{name} has no examples of its own: {why}")
    if (more := len(plan.no_card_examples) - MOST_NAMED) > 0:
        say(f"and {counted(more, 'more expert')} without any")
    device_map = "auto" if is_spread(work, plan) else None
    device = choose_device()
    kept = work.answers_file(canonical_sha256([spec.id, __version__, device]))
    with (
        opened(work, plan, device_map) as (model, as_it_is),
        open_log(kept) as log,
    ):

        def once(key: str, ask: Callable[[], Answers]) -> Answers:
            answers = log.read(key)
            if not answers:
                began = time.perf_counter()
                answers = ask()
                log.append(key, answers, time.perf_counter() - began)
            return answers

        tokenizer = tokenizer_of_gates(as_it_is, spec.template)
        if spec.writers:
            claims = _written(spec, plan, model, tokenizer)
        else:
            claims = divide(
                model,
                tokenizer,
                plan.pool_prompts,
                plan.fused.names,
                known=plan.known_prompts,
                limit=spec.examples_per_expert,
                seed=spec.seed,
                bar=bar,
                once=once,
            )
    labels = work.ledger.blobs.put_bytes(write_claims(claims).encode())
    made = PoolBuild(
        spec=spec,
        labels_sha256=labels,
        shares=shares_of(claims, plan.fused.names),
        wall_seconds=log.earlier_seconds + time.perf_counter() - started,
        device=device,
    )
    work.ledger.record_artifact(
        spec, weights_sha256=labels, built=made, blobs=[labels], run_id=work.run_id
    )
    kept.unlink(missing_ok=True)
    which = "that experts wrote" if spec.writers else "of the pool"
    given = describe_shares(made.shares, plan.known_prompts)
    say(f"of {counted(len(claims), 'prompt')} {which}: {given}")
    if unread := sum(claim.cluster < 0 for claim in claims):
        say(f"{unread:,} of them do not fit into the base's context, and were not read", "note")


def _written(
    spec: PoolSpec, plan: Plan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[Claim]:
    """Have the `writers` write prompts; each prompt belongs to its writer, with its answer."""
    written = write_prompts(
        model, tokenizer, spec.writers, spec.examples_per_expert, seed=spec.seed
    )
    if none := [name for name, own in written.items() if not own]:
        say(
            f"{listed(none, MOST_NAMED)}: these adapters write no questions; give examples of"
            " their tasks, or a pool of prompts",
            "note",
        )
    known = {prompt for own in plan.known_prompts.values() for prompt in own}
    claims = (one for own in written.values() for one in own if one.prompt not in known)
    return [*{one.prompt: one for one in claims}.values()]
