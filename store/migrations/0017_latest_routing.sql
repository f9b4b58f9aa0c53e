-- Of several records of a router's routes the latest counts, and not the earliest: they are read again.

CREATE TEMP TABLE again AS
SELECT sha256 FROM records WHERE kind = 'routing'
QUALIFY count(*) OVER (PARTITION BY subject) > 1;
DELETE FROM routing_counts WHERE record_sha256 IN (FROM again);
DELETE FROM records WHERE sha256 IN (FROM again);
DELETE FROM read_files WHERE EXISTS (FROM again);
DROP TABLE again;
