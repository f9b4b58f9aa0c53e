"""What leaves this machine: uploads, provenance, signatures.

publish        upload a checkpoint, load it from the Hub, compare, record
reload_worker  the process that loads it from the Hub
licences       whether it may be published
in_toto        what a checkpoint or an artifact is made of, as an in-toto statement
openlineage    runs as OpenLineage events
signing        signatures over a checkpoint's files
"""
