"""The record of a run: its start, versions and device, its outcome, and the time of each stage."""

import logging
import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.metadata import version

from meteora.artifacts import MeteoraError
from meteora.untrusted.findings import AdapterError
from pipelines.workspace.context import RunContext
from store.errors import StoreError
from store.events import RunEnded, RunStarted
from store.ledger import Ledger

logger = logging.getLogger(__name__)

VERSIONS = ("torch", "transformers", "safetensors", "prefect", "duckdb", "lm-eval")


@contextmanager
def alone(ledger: Ledger, name: str) -> Generator[Sequence[RunStarted]]:
    """Hold the locks of a run; yields the killed runs of this name, and records their ends.

    Raises:
        BusyError: another process holds them.
    """
    with ledger.running(name) as killed:
        for before in killed:
            shutil.rmtree(ledger.home / "runs" / before.run_id, ignore_errors=True)
        yield killed


@contextmanager
def one_stage(
    context: RunContext, name: str, asked_sha256: str, device: str, stage: str
) -> Generator[None]:
    """A run with one stage, alone and recorded; arguments are those of `recorded`."""
    seconds: dict[str, float] = {}
    with (
        alone(context.ledger, name),
        recorded(context, name, asked_sha256, device, seconds),
        timed(seconds, stage),
    ):
        yield


@contextmanager
def recorded(
    context: RunContext, name: str, asked_sha256: str, device: str, seconds: dict[str, float]
) -> Generator[None]:
    """Record the start of a run and its end, also after an error; remove its temporary files.

    Args:
        name: of the recipe, or of another command's work
        asked_sha256: of the recipe, or of that work's inputs
        seconds: the time of each stage, filled during the run
    """
    ledger, run_id = context.ledger, context.run_id
    versions = {package: version(package) for package in VERSIONS}
    ledger.record_run(RunStarted(run_id, name, asked_sha256, versions, device))
    began = time.perf_counter()
    outcome, reason = "stopped", "interrupted or cancelled"
    try:
        yield
        outcome, reason = "ok", ""
    except MeteoraError as error:
        outcome = "refused" if isinstance(error, AdapterError) else "failed"
        reason = str(error)
        raise
    except Exception as error:
        outcome, reason = "failed", f"{type(error).__name__}: {error}"
        raise
    finally:
        wall_seconds = time.perf_counter() - began
        shutil.rmtree(ledger.home / "runs" / run_id, ignore_errors=True)  # room for the record
        try:
            ledger.record_run(RunEnded(run_id, outcome, reason, wall_seconds, seconds))
        except StoreError as error:
            if outcome == "ok":
                raise
            logger.warning("the end of the run %s is not recorded: %s", run_id, error)
        ledger.ingest()


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Generator[None]:
    """Write the seconds of a stage into `seconds`, also if it fails."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = round(time.perf_counter() - started, 3)
