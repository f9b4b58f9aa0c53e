"""One run at a time on a GPU: two trainings there run out of memory, or slow each other down.

A run that computes on a GPU holds the only slot of a Prefect concurrency limit with the device's
name, among all runs of one server. To let more runs share the device, raise the limit on the
server's page. The slot of a killed run is free again when its lease ends.
"""

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

from pipelines.flows.run_page import if_it_answers
from pipelines.workspace.console import say

LEASE_SECONDS = 60.0
"""The shortest lease that Prefect accepts; it is renewed while the run works."""


@contextmanager
def held(*slots: str) -> Generator[None]:
    """Hold devices, by names in an order that all runs share; wait for those that a run holds.

    If the server does not answer, the run goes on without holding them. A CPU is never held.
    """
    holding = ExitStack()
    try:
        for slot in slots:
            with if_it_answers(f"say whether {slot} is free"):
                _take(slot, holding)
        yield
    finally:
        with if_it_answers(f"take back {', '.join(slots)}"):
            holding.close()


def _take(slot: str, holding: ExitStack) -> None:
    if not _make_limit(slot):
        say(f"waiting for {slot}, which another run holds")
    holding.enter_context(
        concurrency(
            slot,
            strict=True,  # a missing limit would not block
            lease_duration=LEASE_SECONDS,
            raise_on_lease_renewal_failure=False,
        )
    )


def _make_limit(slot: str) -> bool:
    """Create the limit if it is missing; returns whether a slot is free."""
    with get_client(sync_client=True) as client:
        try:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=slot, limit=1))
        except ObjectAlreadyExists:
            there = client.read_global_concurrency_limit_by_name(slot)
            return there.active_slots < there.limit
    return True
