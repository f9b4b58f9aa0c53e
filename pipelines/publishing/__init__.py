"""Publication of checkpoints: uploads, provenance, signatures.

publish        upload a checkpoint, load it from the Hub, compare, record
reload_worker  the process that loads it from the Hub
licences       whether a checkpoint may be published
in_toto        the sources of a checkpoint or an artifact, as an in-toto statement
openlineage    runs as OpenLineage events
signing        signatures over a checkpoint's files
"""
