# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = ["meteora-pipelines[shared]"]
# ///
"""Run a recipe on a GPU that is rented by the hour; each result goes to a store on S3 at once.

    uv run rented_gpu.py s3://BUCKET/PREFIX RECIPE

The machine may be taken away at any time: the same command on another one goes on after the last
stage, or score, that was finished. Credentials are the usual `AWS_…` variables.
"""

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from store.errors import StoreError
from store.ledger import Ledger
from store.sharing import Setting, connect

PATIENCE_SECONDS = 600
"""How long the end waits for a storage that does not answer, before results stay here alone."""


def main() -> int:
    """Returns the exit status: 0 once everything is made, and in the store on S3."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("store", help="s3://BUCKET/PREFIX")
    parser.add_argument("recipe", help="its path, or the name of one that ships")
    parser.add_argument("--home", type=Path, default=Path("~/.meteora"), help="a folder with room")
    parser.add_argument("--cpu", action="store_true", help="run without a GPU, too")
    asked = parser.parse_args()
    if not (asked.cpu or torch.cuda.is_available()):
        return say("torch sees no GPU here, and this machine may cost as if it did; --cpu runs on")
    home = asked.home.expanduser().absolute()
    try:
        if Setting.load(home).remote != asked.store:
            connect(home, asked.store)
        if reason := Ledger(home).ingest().reason:  # what other machines made
            return say(reason)
        status = run(asked.recipe, home)
        return share(Ledger(home)) or status
    except StoreError as error:
        return say(str(error))


def run(recipe: str, home: Path) -> int:
    """Run the recipe; when this machine is to be taken away, the run is told to end, too."""
    command = [sys.executable, "-m", "pipelines.cli", "run", recipe, "--home", str(home)]
    with subprocess.Popen(command) as running:  # noqa: S603  (our own program)
        signal.signal(signal.SIGTERM, lambda *_: running.terminate())
        return abs(running.wait())


def share(ledger: Ledger) -> int:
    """Upload what is left to upload."""
    until = time.monotonic() + PATIENCE_SECONDS
    while reason := ledger.ingest().reason:
        if time.monotonic() > until:
            return say(f"{reason}; some results are in {ledger.home} alone: keep this machine")
        time.sleep(10)
    return 0


def say(problem: str) -> int:
    """Say what is wrong; returns the exit status."""
    print(f"error: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
