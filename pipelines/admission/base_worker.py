"""The process that compares a stranger's base with ours.

A tokenizer of a stranger can end the process that reads it: what parses it panics, or aborts.
"""

from __future__ import annotations

import resource
from pathlib import Path

from meteora.base.match import UnreadableBaseError, compare_bases
from pipelines.admission.base_identity import BaseVerdict
from pipelines.workspace.processes import parent

MOST_MEMORY = 8 << 30
"""Bytes: a small file can describe a large vocabulary."""


def main() -> None:
    run = parent()
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = MOST_MEMORY if hard == resource.RLIM_INFINITY else min(MOST_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hard))
    _, (named, theirs, ours) = run.receive()
    try:
        found = compare_bases(named, Path(theirs), Path(ours))
    except UnreadableBaseError as error:
        verdict = BaseVerdict(str(error))
    else:
        verdict = BaseVerdict(refusals=tuple(found.refusals), warnings=tuple(found.warnings))
    run.send("answer", verdict.to_dict())


if __name__ == "__main__":
    main()
