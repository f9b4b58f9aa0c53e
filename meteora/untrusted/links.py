"""Links in a folder of a stranger: one to a private file would put its text into every copy."""

import os
import re
from pathlib import Path

BLOB = re.compile(r"[0-9a-f]{40,64}")
"""A file's name in the Hub's cache, whose folders of models are links to such files."""


def link_out(folder: Path, name: str) -> Path | None:
    """Return the file outside the folder to which a name in it leads; None for one of its own.

    The link may be the file, or a folder inside the given one.
    """
    target = Path(os.path.realpath(folder / name))
    is_own = target.is_relative_to(os.path.realpath(folder)) or BLOB.fullmatch(target.name)
    return None if is_own else target
