-- How well a router tells the prompts that are no expert's from the experts' own.

CREATE TABLE abstentions (
    router_id VARCHAR NOT NULL,
    num_own BIGINT NOT NULL,
    num_nobodys BIGINT NOT NULL,
    own_share DOUBLE NOT NULL CHECK (isfinite(own_share)),
    nobodys_share DOUBLE NOT NULL CHECK (isfinite(nobodys_share)),
    auroc DOUBLE NOT NULL CHECK (isfinite(auroc)),
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE abstentions IS 'Whether the base has the prompts that are no expert''s, and no others';
COMMENT ON COLUMN abstentions.router_id IS 'Artifact id of the router, of which the base is a choice';
COMMENT ON COLUMN abstentions.num_own IS 'Number of prompts of the experts'' own test rows';
COMMENT ON COLUMN abstentions.num_nobodys IS 'Number of prompts of tasks without an expert';
COMMENT ON COLUMN abstentions.own_share IS 'Mean probability of the base over tokens and modules of the experts'' own prompts, 0 to 1';
COMMENT ON COLUMN abstentions.nobodys_share IS 'The same of the prompts of tasks without an expert';
COMMENT ON COLUMN abstentions.auroc IS 'Area under the ROC curve of that probability: share of the pairs of a nobody''s prompt and an own one in which the former has more, 0 to 1';
COMMENT ON COLUMN abstentions.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

-- Records that an index already has may say it: those of routing are read again.
CREATE TEMP TABLE again AS
SELECT sha256 FROM records WHERE kind = 'artifact' AND starts_with(subject, 'routing:');
DELETE FROM artifacts WHERE record_sha256 IN (FROM again);
DELETE FROM parents WHERE record_sha256 IN (FROM again);
DELETE FROM routing_details WHERE record_sha256 IN (FROM again);
DELETE FROM routing_switches WHERE record_sha256 IN (FROM again);
DELETE FROM records WHERE sha256 IN (FROM again);
DELETE FROM read_files WHERE EXISTS (FROM again);
DROP TABLE again;
