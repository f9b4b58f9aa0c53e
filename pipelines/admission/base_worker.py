"""The process that compares a stranger's base with ours.

It is a process of its own because a stranger's tokenizer file can crash the parser.
"""

from pathlib import Path
from typing import Any

from meteora.base.match import UnreadableBaseError, compare_bases
from pipelines.admission.base_identity import BaseVerdict
from pipelines.workspace.processes import connect_to_parent, limit_memory

MOST_MEMORY = 8 << 30
"""Bytes: a small file can describe a large vocabulary."""


def compare(named: str, theirs: str, ours: str) -> dict[str, Any]:
    """The verdict on a base, from the folders with its profile and with ours."""
    try:
        findings = compare_bases(named, Path(theirs), Path(ours))
    except UnreadableBaseError as error:
        return BaseVerdict(str(error)).to_dict()
    refusals, warnings = tuple(findings.refusals), tuple(findings.warnings)
    return BaseVerdict(refusals=refusals, warnings=warnings).to_dict()


def main() -> None:
    run = connect_to_parent()
    limit_memory(MOST_MEMORY)
    _, request = run.receive()
    run.send("answer", compare(*request))


if __name__ == "__main__":
    main()
