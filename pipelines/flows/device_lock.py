"""The device that stages compute on, which one run has at a time.

Two trainings on one GPU fail for want of memory, or slow each other down. So a run that computes on
one holds the only slot of a concurrency limit of Prefect's, named after the device: it blocks runs
from any process or machine that asks the same server. Whoever raises the limit on the server's page
lets that many share the device. A killed run's slot is free again when its lease is over.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, PrefectException

from pipelines.workspace.console import say

if TYPE_CHECKING:
    from collections.abc import Generator

logger = logging.getLogger(__name__)
LEASE_SECONDS = 60.0
"""Renewed while a run lives; Prefect's shortest."""
FAULTS = (httpx.HTTPError, PrefectException, ConcurrencySlotAcquisitionError, OSError, RuntimeError)


@contextmanager
def held(*slots: str) -> Generator[None]:
    """Have devices for oneself; wait while another run has one of them.

    Where the server does not answer, nobody can be asked, and the run goes on without.

    Args:
        slots: The devices' names, in the order in which every run asks for them; a CPU need not be
            held.
    """
    holding = ExitStack()
    for slot in slots:
        try:
            if not _make_limit(slot):
                say(f"waiting for {slot}, which another run has")
            holding.enter_context(
                concurrency(
                    slot,
                    strict=True,  # a limit that is not there would not block
                    lease_duration=LEASE_SECONDS,
                    raise_on_lease_renewal_failure=False,
                )
            )
        except FAULTS as error:
            logger.warning("the Prefect server does not say whether %s is free: %s", slot, error)
    try:
        yield
    finally:
        try:
            holding.close()
        except FAULTS as error:
            logger.warning(
                "the Prefect server was not told that %s are free: %s", ", ".join(slots), error
            )


def _make_limit(slot: str) -> bool:
    """Make the limit unless it is there, with whatever number; returns whether a slot is free."""
    with get_client(sync_client=True) as client:
        try:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=slot, limit=1))
        except ObjectAlreadyExists:
            there = client.read_global_concurrency_limit_by_name(slot)
            return there.active_slots < there.limit
    return True
