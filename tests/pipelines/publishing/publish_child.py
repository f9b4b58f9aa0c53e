"""Publish in processes that are there to be killed, with the libraries loaded once for all of them.

It is told a checkpoint and its base to begin with. A line of JSON on standard input asks for a
publication. The number of the process that does it is printed when it begins, and how it ended when
it has.
"""

import json
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.admission.checkpoints import FoundCheckpoint
from pipelines.hub.client import Hub
from pipelines.hub.upload import Repository
from pipelines.publishing import publish, reload_worker
from store.ledger import Ledger
from tests.pipelines.hub.hub_here import HubHere


def put(home: str, folder: str, base: str, repo: str, die: str) -> None:
    """Publish a checkpoint as the command line does.

    Args:
        die: `before` or `after` the publication is recorded; empty: not of its own doing
    """
    record = Ledger.record_publication

    def record_and_die(*arguments: Any, **named: Any) -> None:
        if die == "after":
            record(*arguments, **named)
        os.kill(os.getpid(), signal.SIGKILL)

    if die:
        Ledger.record_publication = record_and_die
    publish._reload = ask_here  # ty: ignore[invalid-assignment]
    to = publish.Destination(repo, HubHere(os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"]))
    publish.Repository = partial(Repository, pauses=(0.0,))  # ty: ignore[invalid-assignment]
    publish.publish(Ledger(Path(home)), FoundCheckpoint(Path(folder), Path(base)), to, "a-run")


def ask_here(request: dict[str, Any], hub: Hub) -> dict[str, Any]:  # noqa: ARG001  (as it is called)
    """As the worker does, in this process: loading the model libraries anew would take seconds."""
    return reload_worker.compare(**request)


def main() -> None:
    folder, base = sys.argv[1:]
    found = FoundCheckpoint(Path(folder), Path(base), device="cpu")
    reload_worker.logits(found)  # and what that imports, too, is here from now on
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                put(**json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)  # noqa: T201  (the answer)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(ended, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
