"""`python -m pipelines.cli` is `meteora`."""

from pipelines.cli import main

main()
