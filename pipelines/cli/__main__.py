"""`python -m pipelines.cli` is `meteora`."""

from pipelines.cli.app import main

main()
