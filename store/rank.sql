-- Rank the boards of `unsettled` again, and no others. In one transaction.
--
-- A board is all scores of one task by one metric, on the same rows, asked in the same way. Ranks are
-- computed on narrow rows that carry the row ids of `scores`: with millions of rows, width is slow.

CREATE OR REPLACE TEMP TABLE boards AS
SELECT row_number() OVER () AS board, * FROM (SELECT DISTINCT * FROM unsettled);

CREATE OR REPLACE TEMP TABLE placed AS
SELECT scores.rowid AS number, board,
       rank() OVER (
           PARTITION BY board
           ORDER BY merit(value, higher_is_better) DESC
       ) AS place
FROM scores
JOIN boards USING (task, metric, num_fewshot, max_new_tokens, template, rows_sha256)
SEMI JOIN routers  -- without controls that know the right expert: nobody can use them
       ON routers.id = scores.subject_id
      AND NOT is_control(routers.router);

CREATE OR REPLACE TEMP TABLE bases AS
SELECT board, base_id, seed, value, low, high
FROM scores
JOIN boards USING (task, metric, num_fewshot, max_new_tokens, template, rows_sha256)
WHERE scores.subject_id = scores.base_id;

CREATE OR REPLACE TEMP TABLE oracles AS
WITH alone AS (
    SELECT fused_id, board, base_id, seed, name, value, low, high,
           (merit(value, higher_is_better), -position) AS merit,
           (name = task, merit) AS own_merit
    FROM scores
    JOIN boards USING (task, metric, num_fewshot, max_new_tokens, template, rows_sha256)
    JOIN experts ON experts.adapter_id = scores.subject_id
    UNION ALL  -- composites, conversations: no adapter alone is the right one, each span's own is
    SELECT fused_id, board, base_id, scores.seed, 'each span''s own', value, low, high,
           NULL AS merit,  -- it is none of the adapters, of which one is the best
           (true, (merit(value, higher_is_better), 0)) AS own_merit
    FROM scores
    JOIN boards USING (task, metric, num_fewshot, max_new_tokens, template, rows_sha256)
    JOIN routers ON routers.id = scores.subject_id AND routers.router = 'oracle'
    QUALIFY row_number() OVER (
        PARTITION BY fused_id, board, base_id, scores.seed
        ORDER BY recorded_at DESC, scores.id
    ) = 1
)
SELECT fused_id, board, base_id, seed, arg_max(name, own_merit) AS name,
       arg_max(value, own_merit) AS value, arg_max(low, own_merit) AS low,
       arg_max(high, own_merit) AS high, arg_max(name, merit) AS best_name,
       arg_max(value, merit) AS best_value
FROM alone GROUP BY ALL;

DELETE FROM leaderboard_rows AS old USING boards AS b
WHERE old.task = b.task AND old.metric = b.metric AND old.num_fewshot = b.num_fewshot
  AND old.max_new_tokens = b.max_new_tokens AND old.template = b.template
  AND old.rows_sha256 = b.rows_sha256;

CREATE OR REPLACE TEMP VIEW ranked AS
SELECT task, metric, num_fewshot, place, mine.value, mine.low, mine.high, num_samples,
       bases.value AS base_value, bases.low AS base_low, bases.high AS base_high,
       oracles.value AS oracle_value, oracles.low AS oracle_low, oracles.high AS oracle_high,
       oracles.name AS oracle_name, best_value, best_name, higher_is_better, num_empty,
       num_truncated, router, top_k, method, subject_id, mine.base_id, rows_sha256, max_new_tokens,
       mine.seed, template, harness, recorded_at, run_id
FROM scores AS mine
JOIN placed ON placed.number = mine.rowid
JOIN routers ON routers.id = mine.subject_id
LEFT JOIN bases
       ON bases.board = placed.board AND bases.base_id = mine.base_id AND bases.seed = mine.seed
LEFT JOIN oracles
       ON oracles.board = placed.board AND oracles.base_id = mine.base_id
      AND oracles.seed = mine.seed AND oracles.fused_id = routers.fused_id;

DELETE FROM regression_rows AS old USING boards AS b
WHERE old.task = b.task AND old.metric = b.metric AND old.num_fewshot = b.num_fewshot
  AND old.max_new_tokens = b.max_new_tokens AND old.template = b.template
  AND old.rows_sha256 = b.rows_sha256;

CREATE OR REPLACE TEMP VIEW numbered AS SELECT * FROM placed JOIN scores ON scores.rowid = number;

INSERT INTO regression_rows BY NAME
SELECT recipe_name, router, task, metric, now.value, previous_value, change, change_stderr,
       now.subject_id, earlier.subject_id AS previous_id, now.recorded_at, now.run_id,
       now.num_fewshot, now.max_new_tokens, now.template, now.rows_sha256
FROM followed('numbered')
JOIN scores AS now ON now.rowid = number
JOIN (SELECT rowid AS previous, subject_id FROM scores) AS earlier USING (previous)
WHERE worse;

DELETE FROM unsettled;
