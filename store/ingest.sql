-- From the records of one batch to the rows of every table, in one transaction.
--
-- `batch` (sha256, text) holds the new records. If two records disagree about one subject (two homes
-- were copied together), the earlier one counts, in whatever order they are ingested: an index that
-- grew record by record equals one that is built at once.
--
-- Values arrive as text under the names that they have in the record. `BY NAME` finds their columns,
-- and the tables give them their types. So a new field is a column of its table and a name here.
--
-- A part that begins with IF ANY runs only if there is such a row; one with ALWAYS runs in any case.

CREATE OR REPLACE TEMP MACRO fields(object, names) AS json_transform(
    object, '{"' || array_to_string(names, '": "VARCHAR", "') || '": "VARCHAR"}'
);

CREATE OR REPLACE TEMP TABLE fresh AS
SELECT sha256,
       CASE WHEN kind IN ('artifact', 'score', 'routing', 'adapter', 'publication', 'run-started',
                          'run-ended', 'failure')
            THEN kind ELSE error('a newer release wrote this kind of record: ' || kind) END AS kind,
       CASE WHEN version::INTEGER = 1
            THEN 1 ELSE error('a newer release wrote this version of the record: ' || version) END
            AS version,
       "at"::TIMESTAMP AS recorded_at, run_id, subject, body::JSON AS body
FROM (
    SELECT sha256, unnest(fields(text, ['kind', 'version', 'at', 'run_id', 'subject', 'body']))
    FROM batch
);

INSERT INTO records BY NAME
SELECT sha256, kind, version, recorded_at, run_id, subject FROM fresh;

CREATE OR REPLACE TEMP TABLE made AS
SELECT body->>'id' AS id, body->>'kind' AS kind, body->'spec' AS spec, body->'built' AS built,
       (body->'parents')::VARCHAR[] AS parents, body->>'weights_sha256' AS weights_sha256,
       recorded_at, run_id, sha256 AS record_sha256
FROM fresh WHERE kind = 'artifact';

INSERT INTO artifacts BY NAME
SELECT id, kind, weights_sha256, recorded_at, run_id, record_sha256 FROM made;

INSERT INTO parents BY NAME
SELECT id AS child_id, unnest(parents) AS parent_id, unnest(range(len(parents))) AS position,
       record_sha256
FROM made;

-- IF ANY: made WHERE kind = 'base'
INSERT INTO base_models BY NAME
SELECT id, record_sha256, unnest(fields(spec, ['base_model', 'base_revision', 'quantise'])),
       unnest(fields(built->'fingerprint', ['architecture', 'hidden_size', 'num_hidden_layers',
                                            'vocab_size']))
FROM made WHERE kind = 'base';

-- IF ANY: made WHERE kind = 'adapter'
INSERT INTO adapter_weights BY NAME
SELECT id, record_sha256, unnest(fields(spec, ['base_model', 'use_rslora', 'dtype'])),
       json_array_length(spec->'modules') AS num_modules,
       list_min((spec->'$.modules[*].r')::INTEGER[]) AS min_r,
       list_max((spec->'$.modules[*].r')::INTEGER[]) AS max_r,
       json_array_length(spec->'stripped') AS num_stripped
FROM made WHERE kind = 'adapter';

-- IF ANY: made WHERE kind = 'fused'
INSERT INTO experts BY NAME
SELECT id AS fused_id, unnest(range(len((spec->'names')::JSON[]))) AS position,
       unnest((spec->'names')::VARCHAR[]) AS name,
       unnest((spec->'adapter_ids')::VARCHAR[]) AS adapter_id, record_sha256
FROM made WHERE kind = 'fused';

-- IF ANY: made WHERE kind = 'router'
INSERT INTO routers BY NAME
SELECT id, record_sha256, (spec->'composites')::INTEGER[] AS composites,
       (spec->'stand_ins')::VARCHAR[] AS stand_ins,
       unnest(fields(spec, ['fused_id', 'router', 'top_k', 'temperature', 'method',
                            'examples_sha256', 'seed', 'stand_in'])),
       unnest(fields(built, ['num_tokens', 'heldout_accuracy', 'wall_seconds', 'device']))
FROM made WHERE kind = 'router';

-- IF ANY: made WHERE kind = 'pool'
INSERT INTO pools BY NAME
SELECT id, record_sha256, unnest(fields(spec, ['fused_id', 'prompts_sha256'])),
       unnest(fields(built, ['labels_sha256', 'wall_seconds', 'device']))
FROM made WHERE kind = 'pool';

INSERT INTO pool_shares BY NAME
SELECT id AS pool_id, record_sha256,
       unnest(fields(one, ['expert', 'num_prompts', 'num_clusters', 'score', 'lead']))
FROM (SELECT *, unnest((built->'shares')::JSON[]) AS one FROM made WHERE kind = 'pool');

-- IF ANY: made WHERE kind = 'merge'
INSERT INTO merges BY NAME
SELECT id, record_sha256, unnest(fields(spec, ['fused_id', 'method', 'weight', 'density', 'seed']))
FROM made WHERE kind = 'merge';

-- IF ANY: made WHERE kind = 'comparison'
INSERT INTO comparisons BY NAME
SELECT * RENAME (other_id AS other_score_id)
FROM (
    SELECT id AS comparison_id, recorded_at, run_id, record_sha256,
           unnest(fields(spec, ['subject_id', 'system', 'other'])),
           unnest(fields(one, ['task', 'metric', 'difference', 'low', 'high', 'p_value', 'p_holm',
                               'test', 'num_samples', 'score_id', 'other_id']))
    FROM (SELECT *, unnest((built->'differences')::JSON[]) AS one FROM made
          WHERE kind = 'comparison')
);

-- IF ANY: made WHERE kind = 'speed'
INSERT INTO speeds BY NAME
SELECT id, recorded_at, run_id, record_sha256,
       unnest(fields(spec, ['subject_id', 'prompt_tokens', 'new_tokens', 'batch_size'])),
       unnest(fields(rate, ['phase', 'base_tokens_per_second', 'fused_tokens_per_second', 'ratio',
                            'low', 'high'])),
       unnest(fields(built, ['base_bytes', 'added_bytes', 'base_working_bytes',
                             'fused_working_bytes', 'stored_bytes', 'device', 'num_threads',
                             'dtype']))
FROM (SELECT *, unnest((built->'rates')::JSON[]) AS rate FROM made WHERE kind = 'speed');

-- IF ANY: made WHERE kind = 'routing'
INSERT INTO routing_details BY NAME
SELECT spec->>'router_id' AS router_id, record_sha256,
       unnest(fields(one, ['module', 'entropy_bits', 'weight', 'agreement']))
FROM (SELECT *, unnest((built->'details')::JSON[]) AS one FROM made WHERE kind = 'routing');

INSERT INTO routing_switches BY NAME
SELECT * RENAME (count AS num_switches)
FROM (
    SELECT spec->>'router_id' AS router_id, record_sha256,
           unnest(fields(one, ['expert', 'in_answer', 'delay_tokens', 'count']))
    FROM (SELECT *, unnest((built->'switches')::JSON[]) AS one FROM made WHERE kind = 'routing')
);

INSERT INTO abstentions BY NAME
SELECT spec->>'router_id' AS router_id, record_sha256,
       unnest(fields(built->'abstention', ['num_own', 'num_nobodys', 'own_share', 'nobodys_share',
                                           'auroc']))
FROM made WHERE kind = 'routing' AND (built->>'abstention') IS NOT NULL;

-- ALWAYS
CREATE OR REPLACE TEMP TABLE measured AS
SELECT * REPLACE ( -- fields that older releases did not write
           coalesce(template, 'auto') AS template,
           coalesce(higher_is_better, 'true') AS higher_is_better,
           coalesce(interval_method, 'wilson') AS interval_method,
           coalesce(num_empty, '0') AS num_empty, coalesce(num_truncated, '0') AS num_truncated,
           coalesce(device, '') AS device
       )
FROM (
    SELECT * EXCLUDE (spec) RENAME (interval AS interval_method),
           unnest(fields(spec, ['subject_id', 'base_id', 'task', 'metric', 'num_fewshot',
                                'max_new_tokens', 'seed', 'rows_sha256', 'template',
                                'system_prompt']))
    FROM (
        SELECT recorded_at, run_id, sha256 AS record_sha256,
               unnest(fields(body, ['id', 'spec', 'value', 'stderr', 'low', 'high', 'interval',
                                    'num_samples', 'outputs_sha256', 'harness', 'wall_seconds',
                                    'higher_is_better', 'templated', 'num_empty', 'num_truncated',
                                    'mean_prompt_tokens', 'max_prompt_tokens', 'device',
                                    'parts', 'turns']))
        FROM fresh WHERE kind = 'score'
    )
);

-- IF ANY: measured
INSERT INTO scores BY NAME SELECT * EXCLUDE (parts, turns) FROM measured;

INSERT INTO score_parts BY NAME
SELECT score_id, position, record_sha256,
       unnest(fields(part, ['name', 'value', 'num_samples', 'num_attempted']))
FROM (
    SELECT id AS score_id, record_sha256, unnest(parts::JSON::JSON[]) AS part,
           unnest(range(len(parts::JSON::JSON[]))) AS position
    FROM measured
);

INSERT INTO score_turns BY NAME
SELECT score_id, record_sha256,
       unnest(fields(one, ['turn', 'value', 'prompt_tokens', 'computed_tokens', 'new_tokens',
                           'seconds']))
FROM (
    SELECT id AS score_id, record_sha256, unnest(turns::JSON::JSON[]) AS one FROM measured
);

-- IF ANY: fresh WHERE kind = 'routing'
INSERT INTO routing_counts BY NAME
SELECT record_sha256,
       unnest(fields(count, ['router_id', 'module', 'truth', 'chosen', 'num_tokens']))
FROM (
    SELECT sha256 AS record_sha256, unnest((body->'counts')::JSON[]) AS count
    FROM fresh WHERE kind = 'routing'
);

-- IF ANY: fresh WHERE kind = 'adapter'
INSERT INTO verdicts BY NAME
SELECT recorded_at, run_id, sha256 AS record_sha256,
       coalesce((body->'base_models')::VARCHAR[], []) AS base_models,
       unnest(fields(body, ['name', 'source', 'repo_id', 'revision', 'subfolder', 'verdict',
                            'licence', 'author', 'adapter_id', 'downloads']))
FROM fresh WHERE kind = 'adapter';

INSERT INTO verdict_reasons BY NAME
SELECT position, record_sha256, unnest(fields(reason, ['code', 'message']))
FROM (
    SELECT sha256 AS record_sha256, unnest((body->'reasons')::JSON[]) AS reason,
           unnest(range(len((body->'reasons')::JSON[]))) AS position
    FROM fresh WHERE kind = 'adapter'
);

-- IF ANY: fresh WHERE kind = 'run-started'
INSERT INTO run_starts BY NAME
SELECT recorded_at, sha256 AS record_sha256,
       (body->'versions')::MAP(VARCHAR, VARCHAR) AS versions,
       unnest(fields(body, ['run_id', 'recipe_name', 'recipe_sha256', 'device']))
FROM fresh WHERE kind = 'run-started';

-- IF ANY: fresh WHERE kind = 'run-ended'
INSERT INTO run_ends BY NAME
SELECT recorded_at, sha256 AS record_sha256,
       unnest(fields(body, ['run_id', 'outcome', 'reason', 'wall_seconds']))
FROM fresh WHERE kind = 'run-ended';

INSERT INTO run_stages BY NAME
SELECT run_id, position, record_sha256, unnest(fields(stage, ['stage', 'wall_seconds']))
FROM (
    SELECT sha256 AS record_sha256, body->>'run_id' AS run_id,
           unnest((body->'stages')::JSON[]) AS stage,
           unnest(range(len((body->'stages')::JSON[]))) AS position
    FROM fresh WHERE kind = 'run-ended'
);

-- IF ANY: fresh WHERE kind = 'publication'
INSERT INTO published BY NAME
SELECT recorded_at, run_id, sha256 AS record_sha256,
       unnest(fields(body, ['artifact_id', 'repo_id', 'revision']))
FROM fresh WHERE kind = 'publication';

-- IF ANY: fresh WHERE kind = 'failure'
INSERT INTO failed BY NAME
SELECT recorded_at, run_id, sha256 AS record_sha256,
       unnest(fields(body, ['stage', 'subject', 'error', 'message']))
FROM fresh WHERE kind = 'failure';

-- ALWAYS
-- the earliest record about a subject stands; of a router's routes the latest, since it may be
-- measured again on other rows
CREATE OR REPLACE TEMP TABLE overruled AS
WITH touched AS (
    SELECT DISTINCT kind, subject FROM fresh
    WHERE kind IN ('artifact', 'score', 'routing', 'publication', 'run-started', 'run-ended')
)
SELECT sha256 FROM records SEMI JOIN touched USING (kind, subject)
QUALIFY row_number() OVER (PARTITION BY kind, subject ORDER BY recorded_at, sha256)
        <> CASE kind WHEN 'routing' THEN count(*) OVER (PARTITION BY kind, subject) ELSE 1 END;

-- the boards that have to be ranked again: those of new scores, and of scores of which other new
-- records change a fact; an overruled record has the id of the new one, and so the same board
CREATE OR REPLACE TEMP TABLE concerned AS
SELECT id FROM made UNION SELECT routers.id FROM routers SEMI JOIN made ON fused_id = made.id;

INSERT INTO unsettled
SELECT task, metric, num_fewshot, max_new_tokens, template, rows_sha256 FROM measured
UNION
SELECT task, metric, num_fewshot, max_new_tokens, template, rows_sha256 FROM scores
SEMI JOIN concerned ON concerned.id = scores.subject_id
UNION
SELECT task, metric, num_fewshot, max_new_tokens, template, rows_sha256 FROM scores
WHERE run_id IN (SELECT run_id FROM fresh WHERE kind = 'run-started');

-- IF ANY: overruled
DELETE FROM artifacts WHERE record_sha256 IN (FROM overruled);
DELETE FROM parents WHERE record_sha256 IN (FROM overruled);
DELETE FROM base_models WHERE record_sha256 IN (FROM overruled);
DELETE FROM adapter_weights WHERE record_sha256 IN (FROM overruled);
DELETE FROM experts WHERE record_sha256 IN (FROM overruled);
DELETE FROM routers WHERE record_sha256 IN (FROM overruled);
DELETE FROM scores WHERE record_sha256 IN (FROM overruled);
DELETE FROM score_parts WHERE record_sha256 IN (FROM overruled);
DELETE FROM score_turns WHERE record_sha256 IN (FROM overruled);
DELETE FROM pools WHERE record_sha256 IN (FROM overruled);
DELETE FROM pool_shares WHERE record_sha256 IN (FROM overruled);
DELETE FROM merges WHERE record_sha256 IN (FROM overruled);
DELETE FROM comparisons WHERE record_sha256 IN (FROM overruled);
DELETE FROM speeds WHERE record_sha256 IN (FROM overruled);
DELETE FROM routing_counts WHERE record_sha256 IN (FROM overruled);
DELETE FROM routing_details WHERE record_sha256 IN (FROM overruled);
DELETE FROM routing_switches WHERE record_sha256 IN (FROM overruled);
DELETE FROM abstentions WHERE record_sha256 IN (FROM overruled);
DELETE FROM run_starts WHERE record_sha256 IN (FROM overruled);
DELETE FROM run_ends WHERE record_sha256 IN (FROM overruled);
DELETE FROM run_stages WHERE record_sha256 IN (FROM overruled);
DELETE FROM published WHERE record_sha256 IN (FROM overruled);

-- IF ANY: made WHERE len(parents) > 0
-- an artifact with new parents, and all that is made from it, has new ancestors
CREATE OR REPLACE TEMP TABLE descended AS
WITH children AS (SELECT id FROM made WHERE len(parents) > 0)
FROM children UNION SELECT descendant_id FROM ancestors SEMI JOIN children ON ancestor_id = id;

DELETE FROM ancestors WHERE descendant_id IN (FROM descended);

INSERT INTO ancestors
WITH RECURSIVE steps(descendant_id, ancestor_id, depth) USING KEY (descendant_id, ancestor_id) AS (
    SELECT child_id, parent_id, 1 FROM parents SEMI JOIN descended ON child_id = id
    UNION
    SELECT steps.descendant_id, parents.parent_id, steps.depth + 1
    FROM steps JOIN parents ON parents.child_id = steps.ancestor_id
    ANTI JOIN recurring.steps AS nearer  -- so it ends where a forged record makes a cycle, too
           ON nearer.descendant_id = steps.descendant_id AND nearer.ancestor_id = parents.parent_id
)
FROM steps;

-- ALWAYS
DROP TABLE fresh;
DROP TABLE measured;
DROP TABLE concerned;
DROP TABLE overruled;
DROP TABLE made;
DROP TABLE IF EXISTS descended;
DROP MACRO fields;
