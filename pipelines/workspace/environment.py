"""Environment variables to set before torch, Prefect and Hugging Face libraries load.

glibc's are read when a process starts: they are for the processes in which stages run.
"""

import os
from pathlib import Path

SETTINGS = {
    # no telemetry
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # no library sends the saved token by itself: we pass it, for owners that the user names
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Prefect's first start makes a database and takes up to half a minute; its limit is 20 s
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    # the ledger is the cache and the record: Prefect keeps attempts, and no results
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    # Prefect's log goes to its server; we print the messages for people
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    # torch's C++ code writes past every logger, some lines for each use of its profiler
    "KINETO_LOG_LEVEL": "6",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # glibc returns freed memory to the system at once, and each page that torch takes again costs a
    # fault: 5 million of them in a fit of the quickstart's gates, 4 s on two cores
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # glibc's maximum
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    # we show the progress bars
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare() -> None:
    """Set variables that the user has not set; call it before any of those libraries loads."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def use_prefect_of(home: Path) -> None:
    """Without a user's server, let Prefect keep its files in `home`; call it before it loads."""
    if not has_server():
        os.environ.setdefault("PREFECT_HOME", str(home / "prefect"))


def has_server() -> bool:
    return "PREFECT_API_URL" in os.environ
