-- The questions that people ask, one view each. Made again whenever this file changes. A column without
-- a comment means what its name means in leaderboard, standings, changes or lineage (`store/schema.py`).

CREATE OR REPLACE MACRO short(id) AS split_part(id, ':', 1) || ':' || split_part(id, ':', 2)[:12];

-- Whether a score is significantly worse: Newcombe's interval of the change, from the intervals of the
-- two scores. A standard error would be 0 if all rows are right, or if there is only one.
CREATE OR REPLACE MACRO fell(earlier, earlier_low, earlier_high, now, now_low, now_high, higher_is_better) AS
    CASE WHEN higher_is_better
         THEN earlier - now > sqrt((earlier - earlier_low) ** 2 + (now_high - now) ** 2)
         ELSE now - earlier > sqrt((earlier_high - earlier) ** 2 + (now - now_low) ** 2) END;

-- What scores are ranked by. Means of the same numbers in another order differ in their last digits.
CREATE OR REPLACE MACRO merit(value, higher_is_better) AS
    round(CASE WHEN higher_is_better THEN value ELSE -value END, 9);

-- A control gets the true expert of each token, so it cannot be used as a model.
CREATE OR REPLACE MACRO is_control(router) AS
    router IN ('oracle', 'one_expert', 'single', 'swap', 'alora');

-- without ORDER BY: a query that only counts would sort millions of rows for nothing
CREATE OR REPLACE VIEW leaderboard AS
SELECT * EXCLUDE asking,
       asking = arg_max(asking, (recorded_at, asking)) OVER (PARTITION BY subject_id, task)
       AS is_latest
FROM (SELECT *, (num_fewshot, max_new_tokens, template, rows_sha256) AS asking FROM leaderboard_rows);
COMMENT ON VIEW leaderboard IS 'Routed models and their place on each task, beside the base and the right adapter alone';
COMMENT ON COLUMN leaderboard.task IS 'Name of the task';
COMMENT ON COLUMN leaderboard.metric IS 'Name of the metric, as the harness calls it';
COMMENT ON COLUMN leaderboard.num_fewshot IS 'Number of solved examples in each prompt';
COMMENT ON COLUMN leaderboard.place IS 'Place among all routed models on the same rows, from 1; equal scores share a place';
COMMENT ON COLUMN leaderboard.value IS 'The score, in the metric''s unit';
COMMENT ON COLUMN leaderboard.low IS 'Lower end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard.high IS 'Upper end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard.num_samples IS 'Number of rows that were asked';
COMMENT ON COLUMN leaderboard.base_value IS 'Score of the base alone on the same rows, in the metric''s unit';
COMMENT ON COLUMN leaderboard.base_low IS 'Lower end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard.base_high IS 'Upper end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard.oracle_value IS 'Score of the right adapter alone on the same rows, in the metric''s unit';
COMMENT ON COLUMN leaderboard.oracle_low IS 'Lower end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard.oracle_high IS 'Upper end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN leaderboard.oracle_name IS 'Name of the right adapter: that of the task, or the best if no adapter has its name; for a composite or a conversation ''each span''s own''';
COMMENT ON COLUMN leaderboard.best_value IS 'Best score of the model''s adapters that were measured alone, in the metric''s unit';
COMMENT ON COLUMN leaderboard.best_name IS 'Name of the adapter with the best score';
COMMENT ON COLUMN leaderboard.higher_is_better IS 'Whether a larger value is a better one';
COMMENT ON COLUMN leaderboard.num_empty IS 'Number of empty answers; they count as wrong';
COMMENT ON COLUMN leaderboard.num_truncated IS 'Number of answers that were cut at max_new_tokens';
COMMENT ON COLUMN leaderboard.router IS 'gate, prompt, arrow, norm, fixed, uniform or random';
COMMENT ON COLUMN leaderboard.top_k IS 'Number of experts chosen for a token';
COMMENT ON COLUMN leaderboard.method IS 'calibrate or joint; empty without gates';
COMMENT ON COLUMN leaderboard.subject_id IS 'Artifact id of the router';
COMMENT ON COLUMN leaderboard.base_id IS 'Artifact id of the base';
COMMENT ON COLUMN leaderboard.rows_sha256 IS 'SHA-256 of the rows that were asked, 64 hex digits';
COMMENT ON COLUMN leaderboard.max_new_tokens IS 'Length at which an answer is cut, in tokens';
COMMENT ON COLUMN leaderboard.seed IS 'Seed of the random numbers';
COMMENT ON COLUMN leaderboard.template IS 'chat, plain, or auto: the chat template where the tokenizer has one';
COMMENT ON COLUMN leaderboard.harness IS 'Name and version of the harness';
COMMENT ON COLUMN leaderboard.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN leaderboard.run_id IS 'The run that measured it';
COMMENT ON COLUMN leaderboard.is_latest IS 'Whether these are the rows, solved examples, length and template of the model''s last recorded score on this task. Measuring the same again records nothing new';

CREATE OR REPLACE VIEW means AS
WITH by_task AS (
    SELECT subject_id, router, avg(value) AS fused, avg(base_value) AS base,
           avg(oracle_value) AS oracle
    FROM (
        SELECT *, (subject_id, task, metric) IN
                  (SELECT (subject_id, task, metric) FROM comparisons) AS is_tested
        FROM leaderboard
        WHERE is_latest AND higher_is_better
          AND NOT regexp_matches(metric, '^(composite|conversation)_')  -- of one question a row
    )
    GROUP BY subject_id, router, task, is_tested
    QUALIFY is_tested = bool_or(is_tested) OVER (PARTITION BY subject_id, task)
)
SELECT subject_id, router, count(*) AS num_tasks, avg(fused) AS value, avg(base) AS base_value,
       avg(oracle) AS oracle_value
FROM by_task
GROUP BY subject_id, router, base IS NULL, oracle IS NULL
QUALIFY row_number() OVER (  -- means of different tasks say nothing about each other
    PARTITION BY subject_id
    ORDER BY (base IS NULL)::INTEGER + (oracle IS NULL)::INTEGER, count(*) DESC, oracle IS NULL
) = 1
ORDER BY value DESC, subject_id;
COMMENT ON VIEW means IS 'Mean of each routed model over its tasks, beside those of the base and of the right adapters alone on the same tasks. Of a task with several metrics it takes the one that comparisons tests, else their mean; composites and conversations are left out';
COMMENT ON COLUMN means.router IS 'As in leaderboard';
COMMENT ON COLUMN means.num_tasks IS 'Number of tasks that the means are over: all on which a larger value is better and the base and the adapters were measured, too; if there are none, all on which one of them was, and else all';
COMMENT ON COLUMN means.value IS 'Mean of the model''s scores, in the metrics'' unit';
COMMENT ON COLUMN means.base_value IS 'Mean of the base''s scores; NULL if it was not measured on these tasks';
COMMENT ON COLUMN means.oracle_value IS 'Mean of the scores of each task''s right adapter alone; NULL if they were not measured on these tasks';

CREATE OR REPLACE VIEW standings AS
WITH models AS (FROM routers WHERE NOT is_control(router)),
named AS (
    SELECT id AS router_id, id AS subject_id, 'fused' AS system, '' AS expert FROM models
    UNION ALL
    SELECT mine.id, other.id, other.router, ''
    FROM models AS mine JOIN routers AS other USING (fused_id, top_k, temperature)
    WHERE other.id <> mine.id AND other.method = ''
    UNION ALL
    SELECT models.id, merges.id, merges.method, '' FROM models JOIN merges USING (fused_id)
    UNION ALL
    SELECT models.id, adapter_id, '', experts.name FROM models JOIN experts USING (fused_id)
    UNION ALL
    SELECT models.id, base_models.id, 'base', ''
    FROM models JOIN parents ON child_id = fused_id JOIN base_models ON base_models.id = parent_id
),
found AS (  -- the narrow columns first: all columns of millions of scores take seconds
    SELECT router_id, system, expert, theirs.rowid AS number
    FROM named
    JOIN scores AS mine ON mine.subject_id = router_id
    JOIN scores AS theirs
      ON theirs.subject_id = named.subject_id AND theirs.base_id = mine.base_id
     AND theirs.task = mine.task AND theirs.metric = mine.metric
     AND theirs.num_fewshot = mine.num_fewshot AND theirs.max_new_tokens = mine.max_new_tokens
     AND theirs.seed = mine.seed AND theirs.template = mine.template
     AND theirs.rows_sha256 = mine.rows_sha256
)
SELECT router_id, theirs.task, theirs.metric, theirs.num_fewshot,
       CASE WHEN system <> '' THEN system WHEN expert = theirs.task THEN 'oracle' ELSE 'alone' END
           AS system,
       expert, theirs.value, theirs.low, theirs.high, theirs.stderr, theirs.num_samples,
       theirs.num_empty, theirs.num_truncated, theirs.higher_is_better, theirs.interval_method,
       theirs.harness, theirs.wall_seconds, theirs.outputs_sha256, theirs.id AS score_id,
       theirs.recorded_at, theirs.run_id, theirs.rows_sha256, theirs.max_new_tokens, theirs.template
FROM found
JOIN scores AS theirs ON theirs.rowid = number
ORDER BY router_id, theirs.task, theirs.metric, system, expert;
COMMENT ON VIEW standings IS 'Each routed model, and all other systems that answered the same rows in the same way';
COMMENT ON COLUMN standings.router_id IS 'Artifact id of the routed model';
COMMENT ON COLUMN standings.system IS 'fused (the routed model itself), base, oracle (the task''s own adapter alone), alone (another adapter), the kind of another router, or the method of a merge';
COMMENT ON COLUMN standings.expert IS 'Name of the adapter that was alone; empty for other systems';
COMMENT ON COLUMN standings.stderr IS 'Its standard error, in the metric''s unit';
COMMENT ON COLUMN standings.interval_method IS 'How the interval was found: wilson or bootstrap';
COMMENT ON COLUMN standings.wall_seconds IS 'Time that the measurement took, in seconds; of one that was stopped, since it was last continued';
COMMENT ON COLUMN standings.outputs_sha256 IS 'SHA-256 of the blob with each row''s output, 64 hex digits';
COMMENT ON COLUMN standings.score_id IS 'Benchmark id of the score';

CREATE OR REPLACE VIEW latest_standings AS
WITH askings AS (
    SELECT *, (num_fewshot, max_new_tokens, template, rows_sha256) AS asking FROM standings
)
SELECT router_id, task, metric, num_fewshot, system, expert, value, low, high, num_samples,
       num_empty, num_truncated, higher_is_better, score_id, recorded_at
FROM askings
QUALIFY asking = arg_max(asking, (recorded_at, score_id)) FILTER (system = 'fused')
                     OVER (PARTITION BY router_id, task)
    AND row_number() OVER (  -- the last one, if a control has two seeds
            PARTITION BY router_id, task, asking, metric, system, expert
            ORDER BY recorded_at DESC, score_id
        ) = 1
ORDER BY router_id, task, metric, system, expert;
COMMENT ON VIEW latest_standings IS 'Standings with the rows, solved examples, length and template of the routed model''s last recorded score on each task. Measuring the same again records nothing new';
COMMENT ON COLUMN latest_standings.system IS 'As in standings';

CREATE OR REPLACE VIEW latest_comparisons AS
WITH families AS (
    SELECT comparison_id, count(*) AS num_tests FROM comparisons GROUP BY comparison_id
), asked AS (
    SELECT id AS score_id, higher_is_better,
           asking = arg_max(asking, (recorded_at, id)) OVER (PARTITION BY subject_id, task)
               AS is_latest
    FROM (SELECT *, (num_fewshot, max_new_tokens, template, rows_sha256) AS asking
          FROM scores SEMI JOIN comparisons USING (subject_id))
)
SELECT subject_id, system, other, task, metric, difference, low, high, p_value, p_holm, test,
       num_samples, higher_is_better, score_id, other_score_id, comparison_id, recorded_at, run_id
FROM comparisons JOIN families USING (comparison_id) JOIN asked USING (score_id)
WHERE is_latest
QUALIFY row_number() OVER (  -- one task tested alone is not corrected for the others
    PARTITION BY subject_id, system, other, task
    ORDER BY num_tests DESC, recorded_at DESC, comparison_id
) = 1
ORDER BY subject_id, other, task, metric;
COMMENT ON VIEW latest_comparisons IS 'One comparison of each routed model with each other system, on each task and on the rows of the last score: of several that of the most tasks, and then the last. A row of comparisons stays there when the same is tested again among other tasks';
COMMENT ON COLUMN latest_comparisons.subject_id IS 'Artifact id of the routed model';
COMMENT ON COLUMN latest_comparisons.system IS 'As in comparisons';
COMMENT ON COLUMN latest_comparisons.other IS 'As in comparisons';
COMMENT ON COLUMN latest_comparisons.difference IS 'Score of the model minus that of the other system, in the metric''s unit';
COMMENT ON COLUMN latest_comparisons.p_value IS 'As in comparisons';
COMMENT ON COLUMN latest_comparisons.p_holm IS 'As in comparisons';
COMMENT ON COLUMN latest_comparisons.test IS 'As in comparisons';
COMMENT ON COLUMN latest_comparisons.num_samples IS 'Number of rows that both answered';
COMMENT ON COLUMN latest_comparisons.score_id IS 'Benchmark id of the model''s score';
COMMENT ON COLUMN latest_comparisons.other_score_id IS 'Benchmark id of the other system''s score';
COMMENT ON COLUMN latest_comparisons.comparison_id IS 'Artifact id of the comparison, whose tasks p_holm is corrected over';
COMMENT ON COLUMN latest_comparisons.run_id IS 'The run that tested it';

CREATE OR REPLACE VIEW latest_routing AS
SELECT parent_id AS router_id, arg_max(record_sha256, (recorded_at, record_sha256)) AS record_sha256
FROM (SELECT id AS child_id, recorded_at, record_sha256 FROM artifacts WHERE kind = 'routing')
JOIN (SELECT child_id, parent_id FROM parents) USING (child_id)
GROUP BY parent_id;
COMMENT ON VIEW latest_routing IS 'The last record of each router''s routes';
COMMENT ON COLUMN latest_routing.router_id IS 'Artifact id of the router';
COMMENT ON COLUMN latest_routing.record_sha256 IS 'SHA-256 of the record, 64 hex digits';

CREATE OR REPLACE VIEW conversation_turns AS
SELECT router_id, task, system, turn, score_turns.value, num_samples AS num_conversations,
       prompt_tokens, computed_tokens, new_tokens, seconds, score_id, rows_sha256, recorded_at
FROM standings JOIN score_turns USING (score_id)
ORDER BY router_id, task, system, turn;
COMMENT ON VIEW conversation_turns IS 'Score and cost of each routed model and its controls, at each turn of conversations';
COMMENT ON COLUMN conversation_turns.system IS 'fused (the routed model itself), base, the kind of another router or control, or the method of a merge';
COMMENT ON COLUMN conversation_turns.turn IS 'Number of the turn, from 1';
COMMENT ON COLUMN conversation_turns.value IS 'The score on this turn, in the metric''s unit';
COMMENT ON COLUMN conversation_turns.num_conversations IS 'Number of conversations';
COMMENT ON COLUMN conversation_turns.prompt_tokens IS 'Mean length of the prompt with the whole history, in tokens';
COMMENT ON COLUMN conversation_turns.computed_tokens IS 'Mean number of its tokens that were computed at this turn; the others were in a cache';
COMMENT ON COLUMN conversation_turns.new_tokens IS 'Mean length of the answer, in tokens';
COMMENT ON COLUMN conversation_turns.seconds IS 'Mean time of the turn, in seconds: the time of a batch divided by its number of conversations';
COMMENT ON COLUMN conversation_turns.rows_sha256 IS 'SHA-256 of the conversations that were asked, 64 hex digits; another number of them, or another system prompt, has another one';

CREATE OR REPLACE VIEW lineage AS
WITH relatives AS (
    SELECT id AS artifact_id, 'itself' AS relation, id AS relative_id, 0 AS depth FROM artifacts
    UNION ALL
    SELECT descendant_id, 'made from', ancestor_id, depth FROM ancestors
    UNION ALL
    SELECT ancestor_id, 'used in', descendant_id, depth FROM ancestors
),
origins AS ( -- of a base, and of an adapter each time that it was seen
    SELECT adapter_id AS id, run_id, recorded_at,
           concat_ws('/', repo_id, nullif(subfolder, '')) AS source, revision, licence
    FROM verdicts WHERE adapter_id IS NOT NULL
    QUALIFY row_number() OVER (
        PARTITION BY adapter_id, run_id ORDER BY recorded_at DESC, record_sha256 DESC
    ) = 1
    UNION ALL
    SELECT id, NULL, TIMESTAMP '-infinity', base_model, base_revision, NULL FROM base_models
)
SELECT relatives.artifact_id, relation, depth, relative_id, artifacts.kind,
       coalesce(own.source, before.source) AS source,
       coalesce(own.revision, before.revision) AS revision,
       coalesce(own.licence, before.licence) AS licence,
       artifacts.weights_sha256, artifacts.recorded_at, artifacts.run_id
FROM relatives
LEFT JOIN artifacts ON artifacts.id = relative_id
LEFT JOIN artifacts AS made ON made.id = relatives.artifact_id
LEFT JOIN origins AS own ON own.id = relative_id AND own.run_id = made.run_id
ASOF LEFT JOIN origins AS before
    ON before.id = relative_id AND before.recorded_at <= made.recorded_at;
COMMENT ON VIEW lineage IS 'What each artifact was made from and is used in, down to commit, hash and licence';
COMMENT ON COLUMN lineage.artifact_id IS 'Artifact id to search for';
COMMENT ON COLUMN lineage.relation IS 'itself, made from, or used in. What add or drop made is made from the checkpoint before, and so from an expert that was dropped: the gates were fitted beside it. Which adapters a model contains is in experts';
COMMENT ON COLUMN lineage.depth IS 'Number of steps between the two';
COMMENT ON COLUMN lineage.relative_id IS 'Artifact id of its relative';
COMMENT ON COLUMN lineage.kind IS 'base, adapter, pool, fused, router, merge, routing, comparison or speed; NULL where the relative is not recorded';
COMMENT ON COLUMN lineage.source IS 'Where the run that made the artifact had the relative from, or, if it read none, where it was seen last before: Hub id with its subfolder, gguf: or path:; NULL if it was made in this home';
COMMENT ON COLUMN lineage.revision IS 'Commit of 40 hex digits, or sha256: and the hash of its weights';
COMMENT ON COLUMN lineage.licence IS 'Licence that its card claims; empty where it claims none';
COMMENT ON COLUMN lineage.weights_sha256 IS 'SHA-256 of the relative''s bytes, 64 hex digits';
COMMENT ON COLUMN lineage.recorded_at IS 'When the relative was recorded, UTC';
COMMENT ON COLUMN lineage.run_id IS 'The run that made the relative';

-- The scores of a table beside those of the previous checkpoint of the same recipe. `numbered` names it:
-- columns of scores, with their row ids as `number`, and what they have in common as `board`.
CREATE OR REPLACE MACRO followed(numbered) AS TABLE
SELECT *, value - previous_value AS change, sqrt(stderr ** 2 + previous_stderr ** 2) AS change_stderr,
       fell(previous_value, previous_low, previous_high, value, low, high, higher_is_better)
           AS worse
FROM (
    SELECT number, recipe_name, router, higher_is_better, value, low, high, stderr,
           lag(number) OVER before AS previous, lag(value) OVER before AS previous_value,
           lag(low) OVER before AS previous_low, lag(high) OVER before AS previous_high,
           lag(stderr) OVER before AS previous_stderr
    FROM query_table(numbered) AS measured
    JOIN routers ON routers.id = measured.subject_id AND NOT is_control(routers.router)
    JOIN run_starts ON run_starts.run_id = measured.run_id
    WINDOW before AS (
        PARTITION BY recipe_name, router, board
        ORDER BY measured.recorded_at, left(measured.record_sha256, 12)
    )
)
WHERE previous IS NOT NULL;

CREATE OR REPLACE VIEW changes AS
WITH numbered AS (
    SELECT rowid AS number, *,
           (task, metric, num_fewshot, max_new_tokens, template, rows_sha256) AS board
    FROM scores
)
SELECT recipe_name, router, task, metric, now.value, previous_value, change, change_stderr, worse,
       now.subject_id, earlier.subject_id AS previous_id, now.recorded_at, now.run_id
FROM followed('numbered')
JOIN scores AS now ON now.rowid = number
JOIN (SELECT rowid AS previous, subject_id FROM scores) AS earlier USING (previous);
COMMENT ON VIEW changes IS 'Scores beside those of the previous checkpoint of the same recipe on the same rows';
COMMENT ON COLUMN changes.recipe_name IS 'Name of the recipe; of a file of yours with 8 digits of its path''s hash, since a copy elsewhere is another recipe';
COMMENT ON COLUMN changes.previous_value IS 'Score of the previous checkpoint, in the metric''s unit';
COMMENT ON COLUMN changes.change IS 'Score minus previous score, in the metric''s unit';
COMMENT ON COLUMN changes.change_stderr IS 'Standard error of the change, in the metric''s unit';
COMMENT ON COLUMN changes.worse IS 'Whether it is significantly worse: 0 is outside Newcombe''s 95 % interval of the change';
COMMENT ON COLUMN changes.previous_id IS 'Artifact id of the previous router';

CREATE OR REPLACE VIEW regressions AS
SELECT recipe_name, router, task, metric, value, previous_value, change, change_stderr, subject_id,
       previous_id, recorded_at, run_id
FROM regression_rows;
COMMENT ON VIEW regressions IS 'Scores significantly worse than the previous checkpoint of the same recipe on the same rows';

CREATE OR REPLACE VIEW adapters AS
WITH latest AS (
    SELECT *, min(recorded_at) OVER seen AS first_at, count(*) OVER seen AS num_seen
    FROM verdicts
    WINDOW seen AS (PARTITION BY repo_id, revision, subfolder)
    QUALIFY row_number() OVER (
        PARTITION BY repo_id, revision, subfolder ORDER BY recorded_at DESC, record_sha256
    ) = 1
),
reasons AS (
    SELECT record_sha256, list(code ORDER BY position) AS codes,
           list(message ORDER BY position) AS messages
    FROM verdict_reasons GROUP BY record_sha256
),
uses AS (
    SELECT adapter_id, count(DISTINCT fused_id) AS num_fused FROM experts GROUP BY adapter_id
)
SELECT latest.name, repo_id, revision, subfolder, verdict, coalesce(codes, []) AS codes,
       coalesce(messages, []) AS messages, licence, author, base_model, base_models, downloads, min_r, max_r, dtype, num_modules,
       use_rslora, latest.adapter_id, coalesce(num_fused, 0) AS num_fused, num_seen, first_at,
       recorded_at AS last_at, run_id
FROM latest
LEFT JOIN reasons USING (record_sha256)
LEFT JOIN adapter_weights ON adapter_weights.id = latest.adapter_id
LEFT JOIN uses ON uses.adapter_id = latest.adapter_id
ORDER BY latest.name, repo_id, revision, subfolder;
COMMENT ON VIEW adapters IS 'Every adapter that was seen, the latest verdict on it, and where it is used';
COMMENT ON COLUMN adapters.name IS 'Name of the adapter in the recipe that saw it last';
COMMENT ON COLUMN adapters.repo_id IS 'owner/name on the Hub, or path:<folder name>';
COMMENT ON COLUMN adapters.subfolder IS 'Folder inside the repository; empty for its root';
COMMENT ON COLUMN adapters.verdict IS 'accept, warn or refuse';
COMMENT ON COLUMN adapters.codes IS 'Codes of the reasons, in order';
COMMENT ON COLUMN adapters.messages IS 'The reasons as sentences, in the same order';
COMMENT ON COLUMN adapters.author IS 'Who published it; empty where not known';
COMMENT ON COLUMN adapters.base_model IS 'Base that its config names, unchecked; NULL if its tensors could not be read';
COMMENT ON COLUMN adapters.base_models IS 'Bases that its card names, unchecked; empty if it names none or is not on the Hub';
COMMENT ON COLUMN adapters.downloads IS 'Number of downloads of its repository in the 30 days before, as the Hub counts; NULL if it did not say';
COMMENT ON COLUMN adapters.min_r IS 'Smallest rank of any of its layers; NULL if its tensors could not be read';
COMMENT ON COLUMN adapters.max_r IS 'Largest rank of any of its layers';
COMMENT ON COLUMN adapters.dtype IS 'F32, F16 or BF16';
COMMENT ON COLUMN adapters.num_modules IS 'Number of linear layers that it changes';
COMMENT ON COLUMN adapters.use_rslora IS 'Whether scaling is alpha / sqrt(r) instead of alpha / r';
COMMENT ON COLUMN adapters.adapter_id IS 'Artifact id; NULL if its tensors could not be read';
COMMENT ON COLUMN adapters.num_fused IS 'Number of fused checkpoints that contain it';
COMMENT ON COLUMN adapters.num_seen IS 'Number of times that it was seen';
COMMENT ON COLUMN adapters.first_at IS 'When it was first seen, UTC';
COMMENT ON COLUMN adapters.last_at IS 'When it was last seen, UTC';
COMMENT ON COLUMN adapters.run_id IS 'The run that saw it last';

CREATE OR REPLACE VIEW runs AS
WITH stages AS (
    SELECT run_id, map_from_entries(list((stage, seconds) ORDER BY first)) AS stage_seconds
    FROM (  -- a map takes no key twice, so one odd record would make the whole view fail
        SELECT run_id, stage, sum(run_stages.wall_seconds) AS seconds, min(position) AS first
        FROM run_stages GROUP BY run_id, stage
    )
    GROUP BY run_id
)
SELECT run_id, recipe_name,
       -- the end of a skipped run is recorded first; older DuckDBs, which read views, too, have no if()
       CASE WHEN run_starts.recorded_at > run_ends.recorded_at
            THEN run_ends.recorded_at ELSE run_starts.recorded_at END AS started_at,
       run_ends.recorded_at AS ended_at, outcome, reason, wall_seconds, stage_seconds, device, versions, recipe_sha256
FROM run_starts
FULL JOIN run_ends USING (run_id)
LEFT JOIN stages USING (run_id)
ORDER BY coalesce(started_at, ended_at) DESC, run_id;
COMMENT ON VIEW runs IS 'What ran, how long, on what, and how it ended, latest first';
COMMENT ON COLUMN runs.run_id IS 'Id of the run';
COMMENT ON COLUMN runs.recipe_name IS 'Name of the recipe, as in changes, or what was done to a checkpoint, such as ''benchmark of router:…''; NULL like started_at';
COMMENT ON COLUMN runs.started_at IS 'When it began, UTC; NULL if only its end is recorded';
COMMENT ON COLUMN runs.ended_at IS 'When its end was recorded, UTC; NULL if it still runs, or was killed and the recipe has not run since';
COMMENT ON COLUMN runs.outcome IS 'ok, failed, refused, stopped, killed, skipped_late or skipped_overlap; NULL like ended_at';
COMMENT ON COLUMN runs.reason IS 'Why, a sentence; empty where all went well';
COMMENT ON COLUMN runs.wall_seconds IS 'Time from beginning to end, in seconds';
COMMENT ON COLUMN runs.stage_seconds IS 'Time of each stage, in seconds';
COMMENT ON COLUMN runs.device IS 'What it ran on';
COMMENT ON COLUMN runs.versions IS 'Version of each package that the result depends on';
COMMENT ON COLUMN runs.recipe_sha256 IS 'SHA-256 of the recipe as it was resolved, or of what else was asked for, 64 hex digits';

CREATE OR REPLACE VIEW routing AS
WITH arrived AS (
    SELECT router_id, module, chosen AS expert, sum(num_tokens) AS num_chosen
    FROM routing_counts GROUP BY ALL
),
sent AS (
    SELECT router_id, module, truth AS expert, sum(num_tokens) AS num_tokens,
           coalesce(sum(num_tokens) FILTER (truth = chosen), 0) AS num_right
    FROM routing_counts GROUP BY ALL
)
SELECT router_id, module, TRY_CAST(regexp_extract(module, '\.(\d+)\.', 1) AS INTEGER) AS layer,
       expert, coalesce(num_tokens, 0)::BIGINT AS num_tokens,
       num_right / nullif(num_tokens, 0) AS accuracy,
       coalesce(num_chosen, 0)
           / nullif(sum(num_chosen) OVER (PARTITION BY router_id, module), 0) AS load
FROM sent FULL JOIN arrived USING (router_id, module, expert)
ORDER BY router_id, layer, module, expert;
COMMENT ON VIEW routing IS 'Accuracy and load of each expert at each module';
COMMENT ON COLUMN routing.router_id IS 'Artifact id of the router';
COMMENT ON COLUMN routing.module IS 'Path of the linear layer in the base model';
COMMENT ON COLUMN routing.layer IS 'Number of the layer, from the path; NULL if the path has none';
COMMENT ON COLUMN routing.expert IS 'Name of the expert';
COMMENT ON COLUMN routing.num_tokens IS 'Number of tokens of the expert''s own test rows';
COMMENT ON COLUMN routing.accuracy IS 'Share of those tokens that were sent to the expert, 0 to 1; NULL without tokens';
COMMENT ON COLUMN routing.load IS 'Share of all tokens at this module that were sent to the expert, 0 to 1';

CREATE OR REPLACE VIEW publications AS
SELECT artifact_id, kind, repo_id, revision, weights_sha256, published.recorded_at,
       published.run_id
FROM published LEFT JOIN artifacts ON artifacts.id = artifact_id
ORDER BY published.recorded_at DESC, artifact_id;
COMMENT ON VIEW publications IS 'Where artifacts are published, latest first';
COMMENT ON COLUMN publications.artifact_id IS 'Artifact id';
COMMENT ON COLUMN publications.kind IS 'adapter, fused or router';
COMMENT ON COLUMN publications.repo_id IS 'owner/name on the Hub';
COMMENT ON COLUMN publications.revision IS 'Commit of 40 hex digits';
COMMENT ON COLUMN publications.weights_sha256 IS 'SHA-256 of its bytes, 64 hex digits';
COMMENT ON COLUMN publications.recorded_at IS 'When it was first recorded, UTC';
COMMENT ON COLUMN publications.run_id IS 'The run that published or found it';

CREATE OR REPLACE VIEW failures AS
SELECT failed.recorded_at, failed.run_id, recipe_name, stage, subject, error, message
FROM failed LEFT JOIN run_starts USING (run_id)
UNION ALL
SELECT run_ends.recorded_at, run_id, recipe_name, 'run', recipe_name, outcome, reason
FROM run_ends LEFT JOIN run_starts USING (run_id)
WHERE outcome <> 'ok' AND NOT starts_with(outcome, 'skipped')
UNION ALL
SELECT NULL, NULL, NULL, 'ingest', sha256, 'rejected', reason FROM rejected
ORDER BY recorded_at DESC, subject;
COMMENT ON VIEW failures IS 'What was refused or went wrong, latest first';
COMMENT ON COLUMN failures.run_id IS 'The run that it happened in';
COMMENT ON COLUMN failures.stage IS 'Name of the stage; run for a whole run, ingest for a record that could not be read';
COMMENT ON COLUMN failures.subject IS 'What it happened to: an artifact id, an adapter''s source, a task, a recipe, a record';
COMMENT ON COLUMN failures.error IS 'Class of the exception, a code, or how the run ended';
COMMENT ON COLUMN failures.message IS 'What happened, a sentence';

-- Comments of tables whose migrations, which never change, say less or say it in harder words.
COMMENT ON COLUMN artifacts.kind IS 'base, adapter, pool, fused, router, merge, routing, comparison or speed';
COMMENT ON COLUMN routers.router IS 'gate, prompt, arrow, norm, fixed, uniform or random, or a control: oracle, one_expert, single, swap or alora';
COMMENT ON COLUMN leaderboard_rows.router IS 'As in leaderboard';
COMMENT ON COLUMN regression_rows.router IS 'As in regressions';
COMMENT ON COLUMN regression_rows.recipe_name IS 'As in regressions';
COMMENT ON COLUMN run_starts.recipe_name IS 'As in runs';
COMMENT ON TABLE scores IS 'Every score, with all settings of its measurement';
COMMENT ON TABLE published IS 'Where artifacts are published; anyone may have published them';
COMMENT ON TABLE routing_switches IS 'How many tokens routing needs to follow a change of task';
COMMENT ON COLUMN base_models.quantise IS 'Bits of its linear layers when it is loaded, 4bit or 8bit; empty, or NULL in older records: as in its files';
COMMENT ON COLUMN pool_shares.expert IS 'Name of the expert; empty for the prompts that no expert got';
COMMENT ON COLUMN pool_shares.score IS 'How much larger the expert''s updates are on these prompts than on the whole pool, in standard deviations; for prompts that no expert got, the largest of any expert. If experts wrote the prompts: their log likelihood under the expert minus that under the base, in nats per token';
COMMENT ON COLUMN pool_shares.lead IS 'The score minus that of the next expert. If experts wrote the prompts: their log likelihood in the user''s place minus that of the expert''s answers there, in nats per token';
COMMENT ON COLUMN routers.stand_in IS 'How experts without examples are scored, arrow or norm; empty if all had some';
COMMENT ON COLUMN routers.stand_ins IS 'Names of the experts without examples';
COMMENT ON COLUMN speeds.stored_bytes IS 'Files of experts and gates on disk, in bytes; statistics, from which experts are added later, are not among them';
COMMENT ON COLUMN run_ends.wall_seconds IS 'Time from beginning to end, in seconds; NULL if the run was killed';

CREATE OR REPLACE VIEW dictionary AS
SELECT table_name AS name, column_name, data_type, comment AS meaning
FROM duckdb_columns() WHERE database_name = current_database()
ORDER BY table_name, column_index;
COMMENT ON VIEW dictionary IS 'Every column of every table and view, and what it means';
COMMENT ON COLUMN dictionary.name IS 'Table or view';
COMMENT ON COLUMN dictionary.column_name IS 'Column';
COMMENT ON COLUMN dictionary.data_type IS 'Its type in DuckDB';
COMMENT ON COLUMN dictionary.meaning IS 'What it holds, with its unit';
