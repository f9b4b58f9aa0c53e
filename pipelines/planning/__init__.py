"""All facts that are known before the work: the plan with all its ids, and estimates.

resolve         from a recipe to its plan, for a run, a check for open work, and `--dry-run`
plan            the plan: every spec of a run, and so every id
examples        what gates are fitted to: rows of the recipe, of cards, or of a pool
overlaps        rows that are both examples and tests
recorded_tasks  tasks from the ledger, where a checkpoint is measured without a recipe
room            whether every prompt of the benchmark has room in the base
dry_run         `--dry-run`: the steps that a run would take
row_faults      why that run would refuse its rows
needs           prints its memory, disk and time
estimate        estimates them, stage by stage
fit_estimate    those of a fit of gates
passes          the time of a pass, and how many prompts are answered together
"""
