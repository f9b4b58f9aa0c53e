"""The command line in the test's own process: one of its own takes seconds to start."""

import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from pipelines.cli import app

Said = subprocess.CompletedProcess[str]


def ask(*words: object) -> Said:
    """What `meteora` with these words prints, and the code that it ends with."""
    arguments = ["meteora", *map(str, words)]
    code: object = 0
    out, err = StringIO(), StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", arguments),
        patch.dict(os.environ),
    ):
        try:
            app.main()
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return Said(arguments, code, out.getvalue(), err.getvalue())


def done(*words: object) -> Said:
    """What `meteora` prints where it must not fail."""
    said = ask(*words)
    assert said.returncode == 0, said.stderr
    return said


def meteora(*words: object, home: Path) -> Said:
    return ask(*words, "--home", home)
