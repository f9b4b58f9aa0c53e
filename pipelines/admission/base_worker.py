"""The process that compares a stranger's base with ours.

A tokenizer of a stranger can end the process that reads it: what parses it panics, or aborts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meteora.base.match import UnreadableBaseError, compare_bases
from pipelines.admission.base_identity import BaseVerdict
from pipelines.workspace.processes import limit_memory, parent

MOST_MEMORY = 8 << 30
"""Bytes: a small file can describe a large vocabulary."""


def compare(named: str, theirs: str, ours: str) -> dict[str, Any]:
    """The verdict on a base, from the folders with its profile and with ours."""
    try:
        found = compare_bases(named, Path(theirs), Path(ours))
    except UnreadableBaseError as error:
        return BaseVerdict(str(error)).to_dict()
    return BaseVerdict(refusals=tuple(found.refusals), warnings=tuple(found.warnings)).to_dict()


def main() -> None:
    run = parent()
    limit_memory(MOST_MEMORY)
    _, request = run.receive()
    run.send("answer", compare(*request))


if __name__ == "__main__":
    main()
