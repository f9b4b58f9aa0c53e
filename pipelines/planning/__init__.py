"""All facts that are known before the work: the plan with all its ids, and estimates.

resolve         from a recipe to its plan, for a run, a check for open work, and `--dry-run`
plan            the plan: every spec of a run, and so every id
recorded_tasks  tasks from the ledger, where a checkpoint is measured without a recipe
room            whether every prompt of the benchmark has room in the base
overlaps        rows of an import that are both examples and tests
dry_run         `--dry-run`: the steps that a run would take
estimate        its memory, disk and time
batch_size      how many prompts are answered together
"""
