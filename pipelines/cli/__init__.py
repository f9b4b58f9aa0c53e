"""The command line: `meteora …`.

app          all commands, and `run`, `check`, `sql`, `verify`
run          `run` and `serve`
checkpoint   `generate`, `report`, `publish`, `export`, `sign` and other commands on a checkpoint
experts      `add` and `drop`
store        `store …`
options      options that several commands share
output       tables and findings on stdout
score_table  scores and traces in a terminal
__main__     `python -m pipelines.cli`
"""

from pipelines.cli.app import main

__all__ = ["main"]
