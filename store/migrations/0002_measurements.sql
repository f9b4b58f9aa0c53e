-- More circumstances of a score, merges as subjects, comparisons, and speed.

ALTER TABLE scores ADD COLUMN template VARCHAR DEFAULT 'auto';
ALTER TABLE scores ADD COLUMN higher_is_better BOOLEAN DEFAULT true;
ALTER TABLE scores ADD COLUMN interval_method VARCHAR DEFAULT 'wilson';
ALTER TABLE scores ADD COLUMN templated BOOLEAN;
ALTER TABLE scores ADD COLUMN num_empty BIGINT DEFAULT 0;
ALTER TABLE scores ADD COLUMN num_truncated BIGINT DEFAULT 0;
ALTER TABLE scores ADD COLUMN mean_prompt_tokens DOUBLE;
ALTER TABLE scores ADD COLUMN max_prompt_tokens BIGINT;
ALTER TABLE scores ADD COLUMN device VARCHAR DEFAULT '';
COMMENT ON COLUMN scores.subject_id IS 'Artifact id of what was measured: a base, an adapter alone, a merge, or a router';
COMMENT ON COLUMN scores.template IS 'What was asked for: chat, plain, or auto, the chat template where the tokenizer has one';
COMMENT ON COLUMN scores.higher_is_better IS 'Whether a larger value is a better one';
COMMENT ON COLUMN scores.interval_method IS 'How the interval was found: wilson or bootstrap';
COMMENT ON COLUMN scores.templated IS 'Whether prompts were in the tokenizer''s chat template; NULL where not recorded';
COMMENT ON COLUMN scores.num_empty IS 'Number of answers without a character; they count, as wrong';
COMMENT ON COLUMN scores.num_truncated IS 'Number of answers that were cut at max_new_tokens';
COMMENT ON COLUMN scores.mean_prompt_tokens IS 'Mean length of a prompt with its template, in tokens; NULL where not recorded';
COMMENT ON COLUMN scores.max_prompt_tokens IS 'Length of the longest prompt with its template, in tokens; NULL where not recorded';
COMMENT ON COLUMN scores.device IS 'What it ran on; empty where not recorded';
COMMENT ON COLUMN routers.router IS 'gate, arrow, norm, fixed, uniform or random';

CREATE TABLE score_parts (
    score_id VARCHAR NOT NULL,
    position INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    value DOUBLE NOT NULL CHECK (isfinite(value)),
    num_samples BIGINT NOT NULL,
    num_attempted BIGINT NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE score_parts IS 'What a score comes to on each kind of its questions, such as a sub-task of composites';
COMMENT ON COLUMN score_parts.score_id IS 'Benchmark id of the score';
COMMENT ON COLUMN score_parts.position IS 'Place among the score''s parts, from 0';
COMMENT ON COLUMN score_parts.name IS 'Name of the sub-task';
COMMENT ON COLUMN score_parts.value IS 'The score on it, in the metric''s unit';
COMMENT ON COLUMN score_parts.num_samples IS 'Number of its questions';
COMMENT ON COLUMN score_parts.num_attempted IS 'Number of them that were answered at all';
COMMENT ON COLUMN score_parts.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE merges (
    id VARCHAR NOT NULL,
    fused_id VARCHAR NOT NULL,
    method VARCHAR NOT NULL,
    weight DOUBLE NOT NULL CHECK (isfinite(weight)),
    density DOUBLE NOT NULL CHECK (isfinite(density)),
    seed BIGINT NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE merges IS 'Static merges of a stack''s adapters into the base, as controls';
COMMENT ON COLUMN merges.id IS 'Artifact id';
COMMENT ON COLUMN merges.fused_id IS 'Artifact id of the stack whose adapters are merged';
COMMENT ON COLUMN merges.method IS 'linear, ties or dare_ties';
COMMENT ON COLUMN merges.weight IS 'Weight of every adapter, no unit';
COMMENT ON COLUMN merges.density IS 'Share of each delta''s numbers that is kept, 0 to 1';
COMMENT ON COLUMN merges.seed IS 'Seed of what is dropped';
COMMENT ON COLUMN merges.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE comparisons (
    comparison_id VARCHAR NOT NULL,
    subject_id VARCHAR NOT NULL,
    system VARCHAR NOT NULL,
    other VARCHAR NOT NULL,
    task VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    difference DOUBLE NOT NULL CHECK (isfinite(difference)),
    low DOUBLE NOT NULL CHECK (isfinite(low)),
    high DOUBLE NOT NULL CHECK (isfinite(high)),
    p_value DOUBLE NOT NULL CHECK (isfinite(p_value)),
    p_holm DOUBLE NOT NULL CHECK (isfinite(p_holm)),
    test VARCHAR NOT NULL,
    num_samples BIGINT NOT NULL,
    score_id VARCHAR NOT NULL,
    other_score_id VARCHAR NOT NULL,
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE comparisons IS 'Routed models against others on the same rows, by paired tests';
COMMENT ON COLUMN comparisons.comparison_id IS 'Artifact id of the comparison; its tasks are the family of the correction';
COMMENT ON COLUMN comparisons.subject_id IS 'Artifact id of the routed model';
COMMENT ON COLUMN comparisons.system IS 'What the recipe calls it: fused';
COMMENT ON COLUMN comparisons.other IS 'What the recipe calls the other: base, oracle, arrow and so on';
COMMENT ON COLUMN comparisons.task IS 'Name of the task';
COMMENT ON COLUMN comparisons.metric IS 'Name of the metric';
COMMENT ON COLUMN comparisons.difference IS 'Value of the routed model minus value of the other, in the metric''s unit';
COMMENT ON COLUMN comparisons.low IS 'Lower end of the difference''s 95 % interval, in the metric''s unit';
COMMENT ON COLUMN comparisons.high IS 'Upper end of the difference''s 95 % interval, in the metric''s unit';
COMMENT ON COLUMN comparisons.p_value IS 'Two-sided p of the paired test, 0 to 1';
COMMENT ON COLUMN comparisons.p_holm IS 'The same after Holm''s correction over the tasks; below 0.05 the two differ';
COMMENT ON COLUMN comparisons.test IS 'mcnemar or sign-flip';
COMMENT ON COLUMN comparisons.num_samples IS 'Number of rows that both answered';
COMMENT ON COLUMN comparisons.score_id IS 'Benchmark id of the routed model''s score';
COMMENT ON COLUMN comparisons.other_score_id IS 'Benchmark id of the other''s score';
COMMENT ON COLUMN comparisons.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN comparisons.run_id IS 'The run that compared';
COMMENT ON COLUMN comparisons.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE speeds (
    id VARCHAR NOT NULL,
    subject_id VARCHAR NOT NULL,
    phase VARCHAR NOT NULL,
    base_tokens_per_second DOUBLE NOT NULL CHECK (isfinite(base_tokens_per_second)),
    fused_tokens_per_second DOUBLE NOT NULL CHECK (isfinite(fused_tokens_per_second)),
    ratio DOUBLE NOT NULL CHECK (isfinite(ratio)),
    low DOUBLE NOT NULL CHECK (isfinite(low)),
    high DOUBLE NOT NULL CHECK (isfinite(high)),
    prompt_tokens BIGINT NOT NULL,
    new_tokens BIGINT NOT NULL,
    batch_size BIGINT NOT NULL,
    base_bytes BIGINT NOT NULL,
    added_bytes BIGINT NOT NULL,
    base_working_bytes BIGINT,
    fused_working_bytes BIGINT,
    stored_bytes BIGINT NOT NULL,
    device VARCHAR NOT NULL,
    num_threads INTEGER NOT NULL,
    dtype VARCHAR NOT NULL,
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE speeds IS 'Routed models timed against their own base, in turns, one row a phase';
COMMENT ON COLUMN speeds.id IS 'Artifact id of the timing';
COMMENT ON COLUMN speeds.subject_id IS 'Artifact id of the routed model';
COMMENT ON COLUMN speeds.phase IS 'prefill (the prompt) or decode (one token after the other)';
COMMENT ON COLUMN speeds.base_tokens_per_second IS 'Rate of the base, in tokens per second';
COMMENT ON COLUMN speeds.fused_tokens_per_second IS 'Rate of the routed model, in tokens per second';
COMMENT ON COLUMN speeds.ratio IS 'Time of the routed model over time of the base, no unit';
COMMENT ON COLUMN speeds.low IS 'Lower end of the ratio''s 95 % interval, no unit';
COMMENT ON COLUMN speeds.high IS 'Upper end of the ratio''s 95 % interval, no unit';
COMMENT ON COLUMN speeds.prompt_tokens IS 'Length of a prompt, in tokens';
COMMENT ON COLUMN speeds.new_tokens IS 'Length of an answer, in tokens';
COMMENT ON COLUMN speeds.batch_size IS 'Number of prompts at a time';
COMMENT ON COLUMN speeds.base_bytes IS 'Weights of the base in memory, in bytes';
COMMENT ON COLUMN speeds.added_bytes IS 'Experts and routers in memory, in bytes';
COMMENT ON COLUMN speeds.base_working_bytes IS 'The most that a prefill of the base took beyond all weights, in bytes; NULL where not measured';
COMMENT ON COLUMN speeds.fused_working_bytes IS 'The same of the routed model, in bytes; NULL where not measured';
COMMENT ON COLUMN speeds.stored_bytes IS 'What the checkpoint adds to the base on disk, in bytes';
COMMENT ON COLUMN speeds.device IS 'What it ran on';
COMMENT ON COLUMN speeds.num_threads IS 'Number of threads that computed';
COMMENT ON COLUMN speeds.dtype IS 'Number format of the base';
COMMENT ON COLUMN speeds.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN speeds.run_id IS 'The run that timed it';
COMMENT ON COLUMN speeds.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';
