"""The command line: `meteora …`.

app          puts all commands together
run          `run` and `schedule`
benchmark    `benchmark`, a checkpoint measured without running its recipe
experts      `check`, `train`, `add` and `drop`
checkpoint   `generate`, `report`, `publish`, `export`, `sign` and other commands on a checkpoint
chat         `chat`, a conversation in the terminal, and `chat-server`
recipe       `recipe show` and `recipe reference`
store        `sql`, `verify` and `store …`
options      options that several commands share
output       answers of the ledger and findings, printed
score_table  scores and traces, printed
__main__     `python -m pipelines.cli`
"""

import sys


def main() -> None:
    """As `app.main`, which takes a moment to import: Ctrl-C is no traceback then, either."""
    try:
        from pipelines.cli import app
    except KeyboardInterrupt:
        sys.exit(130)
    app.main()
