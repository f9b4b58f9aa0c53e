"""The surroundings of a run: home, recipe, console, environment, machine.

context       the ledger, the recipe and the run's id in one object
bases         the bases of a home: read-only, and checked before they are used
console       lines and bars on stderr
environment   settings that other libraries read at import
cron          checks a schedule without Prefect
faults        faults of the machine, each in one sentence
machine       the speed of this machine
recorded_run  the record of a run, from its beginning to its end
checkpoints   the folder of a checkpoint that a user names, and the files to free with it
"""
