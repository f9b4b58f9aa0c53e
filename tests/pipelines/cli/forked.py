"""The command line in processes of its own that fork from one with the libraries loaded.

To load them takes seconds, and what they read of the environment they read then. A line of JSON on
standard input asks for a command: its words, and the files for what it says.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

ROOT = Path(__file__).parents[3]


class Forks:
    """Commands whose libraries were loaded in this environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._held = ExitStack()
        self._folder = Path(self._held.enter_context(TemporaryDirectory()))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.cli.forked"],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._held.enter_context(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._held.close()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        assert self._process.stdin
        assert self._process.stdout
        said = [self._folder / name for name in ("out", "err")]
        print(json.dumps([words, list(map(str, said))]), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(words, code, *(path.read_text() for path in said))


def command(words: list[str], said: list[str]) -> None:
    """Be the command line."""
    from pipelines.cli.app import main as command_line  # noqa: PLC0415

    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["meteora", *words]
    code: object = 0
    try:
        command_line()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def main() -> None:
    from transformers.models.llama import modeling_llama  # noqa: F401, PLC0415

    import meteora.model.fused  # noqa: F401, PLC0415
    import pipelines.stages.worker  # noqa: F401, PLC0415

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            command(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
