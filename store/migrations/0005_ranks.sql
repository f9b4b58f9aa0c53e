-- What would take too long to find out among millions of scores, kept as it changes (`rank.sql`).

CREATE TABLE unsettled (
    task VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    num_fewshot INTEGER NOT NULL,
    max_new_tokens INTEGER NOT NULL,
    template VARCHAR NOT NULL,
    rows_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE unsettled IS 'Boards (scores of the same rows, asked in the same way) that have to be ranked again; empty when an ingest ends';
COMMENT ON COLUMN unsettled.task IS 'Name of the task';
COMMENT ON COLUMN unsettled.metric IS 'Name of the metric, as the harness calls it';
COMMENT ON COLUMN unsettled.num_fewshot IS 'Number of solved examples in each prompt';
COMMENT ON COLUMN unsettled.max_new_tokens IS 'Length at which an answer is cut, in tokens';
COMMENT ON COLUMN unsettled.template IS 'chat, plain, or auto: the chat template where the tokenizer has one';
COMMENT ON COLUMN unsettled.rows_sha256 IS 'SHA-256 of the rows that were asked, 64 hex digits';
INSERT INTO unsettled
SELECT DISTINCT task, metric, num_fewshot, max_new_tokens, template, rows_sha256 FROM scores;

CREATE TABLE leaderboard_rows (
    task VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    num_fewshot INTEGER NOT NULL,
    place BIGINT NOT NULL,
    value DOUBLE NOT NULL,
    low DOUBLE NOT NULL,
    high DOUBLE NOT NULL,
    num_samples BIGINT NOT NULL,
    base_value DOUBLE,
    base_low DOUBLE,
    base_high DOUBLE,
    oracle_value DOUBLE,
    oracle_low DOUBLE,
    oracle_high DOUBLE,
    oracle_name VARCHAR,
    best_value DOUBLE,
    best_name VARCHAR,
    higher_is_better BOOLEAN NOT NULL,
    num_empty BIGINT NOT NULL,
    num_truncated BIGINT NOT NULL,
    router VARCHAR NOT NULL,
    top_k INTEGER NOT NULL,
    method VARCHAR NOT NULL,
    subject_id VARCHAR NOT NULL,
    base_id VARCHAR NOT NULL,
    rows_sha256 VARCHAR NOT NULL,
    max_new_tokens INTEGER NOT NULL,
    seed BIGINT NOT NULL,
    template VARCHAR NOT NULL,
    harness VARCHAR NOT NULL,
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL
);
COMMENT ON TABLE leaderboard_rows IS 'What leaderboard shows, in no order';
COMMENT ON COLUMN leaderboard_rows.task IS 'Name of the task';
COMMENT ON COLUMN leaderboard_rows.metric IS 'Name of the metric, as the harness calls it';
COMMENT ON COLUMN leaderboard_rows.num_fewshot IS 'Number of solved examples in each prompt';
COMMENT ON COLUMN leaderboard_rows.place IS 'Place among all routed models on the same rows, from 1; equals share one';
COMMENT ON COLUMN leaderboard_rows.value IS 'The score, in the metric''s unit';
COMMENT ON COLUMN leaderboard_rows.low IS 'Lower end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard_rows.high IS 'Upper end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard_rows.num_samples IS 'Number of rows that were asked';
COMMENT ON COLUMN leaderboard_rows.base_value IS 'Score of the base alone on the same rows, in the metric''s unit';
COMMENT ON COLUMN leaderboard_rows.base_low IS 'Lower end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard_rows.base_high IS 'Upper end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard_rows.oracle_value IS 'Score of the right adapter alone on the same rows, in the metric''s unit';
COMMENT ON COLUMN leaderboard_rows.oracle_low IS 'Lower end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard_rows.oracle_high IS 'Upper end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard_rows.oracle_name IS 'Name of that adapter: the task''s own, or the best where no adapter has its name; of a composite, each span''s own';
COMMENT ON COLUMN leaderboard_rows.best_value IS 'Best score of any of its adapters that were measured alone, in the metric''s unit';
COMMENT ON COLUMN leaderboard_rows.best_name IS 'Name of that adapter';
COMMENT ON COLUMN leaderboard_rows.higher_is_better IS 'Whether a larger value is a better one';
COMMENT ON COLUMN leaderboard_rows.num_empty IS 'Number of answers without a character; they count, as wrong';
COMMENT ON COLUMN leaderboard_rows.num_truncated IS 'Number of answers that were cut at max_new_tokens';
COMMENT ON COLUMN leaderboard_rows.router IS 'gate, arrow, norm, fixed, uniform or random';
COMMENT ON COLUMN leaderboard_rows.top_k IS 'Number of experts chosen for a token';
COMMENT ON COLUMN leaderboard_rows.method IS 'calibrate or joint; empty without gates';
COMMENT ON COLUMN leaderboard_rows.subject_id IS 'Artifact id of the router';
COMMENT ON COLUMN leaderboard_rows.base_id IS 'Artifact id of the base';
COMMENT ON COLUMN leaderboard_rows.rows_sha256 IS 'SHA-256 of the rows that were asked, 64 hex digits';
COMMENT ON COLUMN leaderboard_rows.max_new_tokens IS 'Length at which an answer is cut, in tokens';
COMMENT ON COLUMN leaderboard_rows.seed IS 'Seed of the random numbers';
COMMENT ON COLUMN leaderboard_rows.template IS 'chat, plain, or auto: the chat template where the tokenizer has one';
COMMENT ON COLUMN leaderboard_rows.harness IS 'Name and version of the harness';
COMMENT ON COLUMN leaderboard_rows.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN leaderboard_rows.run_id IS 'The run that measured it';

CREATE TABLE regression_rows (
    recipe_name VARCHAR NOT NULL,
    router VARCHAR NOT NULL,
    task VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    value DOUBLE NOT NULL,
    previous_value DOUBLE NOT NULL,
    change DOUBLE NOT NULL,
    change_stderr DOUBLE NOT NULL,
    subject_id VARCHAR NOT NULL,
    previous_id VARCHAR NOT NULL,
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    num_fewshot INTEGER NOT NULL,
    max_new_tokens INTEGER NOT NULL,
    template VARCHAR NOT NULL,
    rows_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE regression_rows IS 'What regressions shows, with the whole of what the scores have in common';
COMMENT ON COLUMN regression_rows.recipe_name IS 'Name of the recipe';
COMMENT ON COLUMN regression_rows.router IS 'gate, arrow, norm, fixed, uniform or random';
COMMENT ON COLUMN regression_rows.task IS 'Name of the task';
COMMENT ON COLUMN regression_rows.metric IS 'Name of the metric, as the harness calls it';
COMMENT ON COLUMN regression_rows.value IS 'The score, in the metric''s unit';
COMMENT ON COLUMN regression_rows.previous_value IS 'Score of the previous checkpoint, in the metric''s unit';
COMMENT ON COLUMN regression_rows.change IS 'Score minus previous score, in the metric''s unit';
COMMENT ON COLUMN regression_rows.change_stderr IS 'Standard error of the change, in the metric''s unit';
COMMENT ON COLUMN regression_rows.subject_id IS 'Artifact id of the router';
COMMENT ON COLUMN regression_rows.previous_id IS 'Artifact id of the previous router';
COMMENT ON COLUMN regression_rows.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN regression_rows.run_id IS 'The run that measured it';
COMMENT ON COLUMN regression_rows.num_fewshot IS 'Number of solved examples in each prompt';
COMMENT ON COLUMN regression_rows.max_new_tokens IS 'Length at which an answer is cut, in tokens';
COMMENT ON COLUMN regression_rows.template IS 'chat, plain, or auto: the chat template where the tokenizer has one';
COMMENT ON COLUMN regression_rows.rows_sha256 IS 'SHA-256 of the rows that were asked, 64 hex digits';
