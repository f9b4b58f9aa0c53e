"""What leaves the house: uploads, provenance, signatures.

publish        upload a checkpoint, load it from there, compare, record
reload_worker  the process that loads it
licences       may it be published?
lineage        what a checkpoint is made of
in_toto        that as an in-toto statement
attest         the same for any artifact of the ledger
openlineage    runs as OpenLineage events
signing        signatures over a checkpoint's files
"""
