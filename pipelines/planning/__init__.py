"""Everything that is known before the work: ids, estimates, what is left to do.

plan      every spec of a run, and so every id
dry_run   `--dry-run`: what a run would do
estimate  its memory, disk and time
"""
