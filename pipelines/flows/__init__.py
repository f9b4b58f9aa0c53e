"""Prefect: the flow, its server, its schedules.

flow             the main flow: all stages in order
up_to_date       whether anything is left to do
local_server     a Prefect server for a home that has none
server_secret    the secret of this server
own_origin       refuses requests from other sites
deployments      recipes that run on a schedule
missed_runs      missed runs, and runs that overlap
run_page         a run's page in Prefect
failure_webhook  a webhook that is called when runs fail
device_lock      one run on a GPU at a time
parallel         several recipes at once, on Dask or Ray
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.flows.flow import fuse_adapters

__all__ = ["fuse_adapters"]


def __getattr__(name: str) -> object:
    """`pipelines.flows.fuse_adapters` is the entry point of deployments: load it on first use."""
    if name == "fuse_adapters":
        from pipelines.flows.flow import fuse_adapters  # noqa: PLC0415  (it loads Prefect)

        return fuse_adapters
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
