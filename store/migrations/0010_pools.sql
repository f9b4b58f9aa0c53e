-- Pools of prompts without labels, and what each expert was given of them.

CREATE TABLE pools (
    id VARCHAR NOT NULL,
    fused_id VARCHAR NOT NULL,
    prompts_sha256 VARCHAR NOT NULL,
    labels_sha256 VARCHAR NOT NULL,
    wall_seconds DOUBLE NOT NULL CHECK (isfinite(wall_seconds)),
    device VARCHAR NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE pools IS 'Prompts without labels that were dealt to the experts of a stack';
COMMENT ON COLUMN pools.id IS 'Artifact id; a router that took examples from the pool has it as a parent';
COMMENT ON COLUMN pools.fused_id IS 'Artifact id of the stack';
COMMENT ON COLUMN pools.prompts_sha256 IS 'SHA-256 of the prompts, 64 hex digits';
COMMENT ON COLUMN pools.labels_sha256 IS 'SHA-256 of the file that says whose each prompt is, 64 hex digits';
COMMENT ON COLUMN pools.wall_seconds IS 'Time that it took, in seconds';
COMMENT ON COLUMN pools.device IS 'What it ran on';
COMMENT ON COLUMN pools.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE pool_shares (
    pool_id VARCHAR NOT NULL,
    expert VARCHAR NOT NULL,
    num_prompts BIGINT NOT NULL,
    num_clusters BIGINT NOT NULL,
    score DOUBLE NOT NULL CHECK (isfinite(score)),
    lead DOUBLE NOT NULL CHECK (isfinite(lead)),
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE pool_shares IS 'What each expert was given of a pool';
COMMENT ON COLUMN pool_shares.pool_id IS 'Artifact id of the pool';
COMMENT ON COLUMN pool_shares.expert IS 'Name of the expert; empty for the prompts that are nobody''s';
COMMENT ON COLUMN pool_shares.num_prompts IS 'Number of prompts';
COMMENT ON COLUMN pool_shares.num_clusters IS 'Number of clusters of similar prompts that they lie in';
COMMENT ON COLUMN pool_shares.score IS 'How much larger the expert''s updates are there than elsewhere, in standard deviations; for nobody''s that of the expert with the most';
COMMENT ON COLUMN pool_shares.lead IS 'How far that is above the next expert''s, in the same unit';
COMMENT ON COLUMN pool_shares.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';
