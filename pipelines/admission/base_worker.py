"""The process that compares a stranger's base with ours.

It is a process of its own because a stranger's tokenizer file can crash the parser.
"""

from __future__ import annotations

from pathlib import Path

from meteora.base.match import UnreadableBaseError, compare_bases
from pipelines.admission.base_identity import BaseVerdict
from pipelines.workspace.processes import limit_memory, parent

MOST_MEMORY = 8 << 30
"""Bytes: a small file can describe a large vocabulary."""


def main() -> None:
    run = parent()
    limit_memory(MOST_MEMORY)
    _, (named, theirs, ours) = run.receive()
    try:
        findings = compare_bases(named, Path(theirs), Path(ours))
    except UnreadableBaseError as error:
        verdict = BaseVerdict(str(error))
    else:
        verdict = BaseVerdict(refusals=tuple(findings.refusals), warnings=tuple(findings.warnings))
    run.send("answer", verdict.to_dict())


if __name__ == "__main__":
    main()
