-- From the records of one batch to the rows of every table, in one transaction.
--
-- `batch` (sha256, text) holds the records that are new. Where two records disagree about one
-- subject (two homes were copied together), the earlier one stands, in whatever order they came:
-- so an index that grew record by record equals one that is built at once.

CREATE OR REPLACE TEMP TABLE fresh AS
SELECT sha256,
       CASE WHEN p[1] IN ('artifact', 'score', 'routing', 'adapter', 'publication', 'run-started',
                          'run-ended', 'failure')
            THEN p[1] ELSE error('a newer release wrote this kind of record: ' || p[1]) END AS kind,
       CASE WHEN p[2]::INTEGER = 1
            THEN 1 ELSE error('a newer release wrote this version of the record: ' || p[2]) END
            AS version,
       p[3]::TIMESTAMP AS recorded_at, p[4] AS run_id, p[5] AS subject, p[6]::JSON AS body
FROM (
    SELECT sha256, -- a list of paths, for a text is parsed as often as `->>` stands there
           text->>['$.kind', '$.version', '$.at', '$.run_id', '$.subject', '$.body'] AS p
    FROM batch
);

INSERT INTO records
SELECT sha256, kind, version, recorded_at, run_id, subject FROM fresh;

INSERT INTO artifacts
SELECT body->>'id', body->>'kind', body->>'weights_sha256', recorded_at, run_id, sha256
FROM fresh WHERE kind = 'artifact';

INSERT INTO parents
SELECT body->>'id', unnest((body->'parents')::VARCHAR[]),
       unnest(range(len((body->'parents')::JSON[]))), sha256
FROM fresh WHERE kind = 'artifact';

INSERT INTO base_models
SELECT body->>'id', body->>'$.spec.base_model', body->>'$.spec.base_revision',
       body->>'$.built.fingerprint.architecture', (body->>'$.built.fingerprint.hidden_size')::INTEGER,
       (body->>'$.built.fingerprint.num_hidden_layers')::INTEGER,
       (body->>'$.built.fingerprint.vocab_size')::INTEGER, sha256
FROM fresh WHERE kind = 'artifact' AND (body->>'kind') = 'base';

INSERT INTO adapter_weights
SELECT body->>'id', body->>'$.spec.base_model', (body->>'$.spec.use_rslora')::BOOLEAN,
       body->>'$.spec.dtype', json_array_length(body->'$.spec.modules'),
       list_min((body->'$.spec.modules[*].r')::INTEGER[]),
       list_max((body->'$.spec.modules[*].r')::INTEGER[]),
       json_array_length(body->'$.spec.stripped'), sha256
FROM fresh WHERE kind = 'artifact' AND (body->>'kind') = 'adapter';

INSERT INTO experts
SELECT body->>'id', unnest(range(len((body->'$.spec.names')::JSON[]))),
       unnest((body->'$.spec.names')::VARCHAR[]), unnest((body->'$.spec.adapter_ids')::VARCHAR[]),
       sha256
FROM fresh WHERE kind = 'artifact' AND (body->>'kind') = 'fused';

INSERT INTO routers
SELECT body->>'id', body->>'$.spec.fused_id', body->>'$.spec.router',
       (body->>'$.spec.top_k')::INTEGER, (body->>'$.spec.temperature')::DOUBLE,
       body->>'$.spec.method', body->>'$.spec.examples_sha256', (body->>'$.spec.seed')::BIGINT,
       (body->>'$.built.num_tokens')::BIGINT, (body->>'$.built.heldout_accuracy')::DOUBLE,
       (body->>'$.built.wall_seconds')::DOUBLE, body->>'$.built.device', sha256,
       (body->'$.spec.composites')::INTEGER[], body->>'$.spec.stand_in',
       (body->'$.spec.stand_ins')::VARCHAR[]
FROM fresh WHERE kind = 'artifact' AND (body->>'kind') = 'router';

CREATE OR REPLACE TEMP TABLE measured AS
SELECT p[1] AS id, p[2] AS subject_id, p[3] AS base_id, p[4] AS task, p[5] AS metric,
       p[6]::INTEGER AS num_fewshot, p[7]::INTEGER AS max_new_tokens, p[8]::BIGINT AS seed,
       p[9] AS rows_sha256, p[10]::DOUBLE AS value, p[11]::DOUBLE AS stderr, p[12]::DOUBLE AS low,
       p[13]::DOUBLE AS high, p[14]::BIGINT AS num_samples, p[15] AS outputs_sha256,
       p[16] AS harness, p[17]::DOUBLE AS wall_seconds, recorded_at, run_id,
       sha256 AS record_sha256, coalesce(p[18], 'auto') AS template,
       coalesce(p[19]::BOOLEAN, true) AS higher_is_better,
       coalesce(p[20], 'wilson') AS interval_method, p[21]::BOOLEAN AS templated,
       coalesce(p[22]::BIGINT, 0) AS num_empty, coalesce(p[23]::BIGINT, 0) AS num_truncated,
       p[24]::DOUBLE AS mean_prompt_tokens, p[25]::BIGINT AS max_prompt_tokens,
       coalesce(p[26], '') AS device
FROM (
    SELECT recorded_at, run_id, sha256,
           body->>['$.id', '$.spec.subject_id', '$.spec.base_id', '$.spec.task', '$.spec.metric',
                   '$.spec.num_fewshot', '$.spec.max_new_tokens', '$.spec.seed',
                   '$.spec.rows_sha256', '$.value', '$.stderr', '$.low', '$.high', '$.num_samples',
                   '$.outputs_sha256', '$.harness', '$.wall_seconds', '$.spec.template',
                   '$.higher_is_better', '$.interval', '$.templated', '$.num_empty',
                   '$.num_truncated', '$.mean_prompt_tokens', '$.max_prompt_tokens', '$.device']
               AS p
    FROM fresh WHERE kind = 'score'
);

INSERT INTO scores BY NAME FROM measured;

INSERT INTO score_parts
SELECT score_id, position, part->>'name', (part->>'value')::DOUBLE,
       (part->>'num_samples')::BIGINT, (part->>'num_attempted')::BIGINT, sha256
FROM (
    SELECT sha256, body->>'id' AS score_id, unnest((body->'parts')::JSON[]) AS part,
           unnest(range(len((body->'parts')::JSON[]))) AS position
    FROM fresh WHERE kind = 'score'
);

INSERT INTO merges
SELECT body->>'id', body->>'$.spec.fused_id', body->>'$.spec.method',
       (body->>'$.spec.weight')::DOUBLE, (body->>'$.spec.density')::DOUBLE,
       (body->>'$.spec.seed')::BIGINT, sha256
FROM fresh WHERE kind = 'artifact' AND (body->>'kind') = 'merge';

INSERT INTO comparisons
SELECT body->>'id', body->>'$.spec.subject_id', body->>'$.spec.system', body->>'$.spec.other',
       one->>'task', one->>'metric', (one->>'difference')::DOUBLE, (one->>'low')::DOUBLE,
       (one->>'high')::DOUBLE, (one->>'p_value')::DOUBLE, (one->>'p_holm')::DOUBLE, one->>'test',
       (one->>'num_samples')::BIGINT, one->>'score_id', one->>'other_id', recorded_at, run_id,
       sha256
FROM (
    SELECT body, recorded_at, run_id, sha256,
           unnest((body->'$.built.differences')::JSON[]) AS one
    FROM fresh WHERE kind = 'artifact' AND (body->>'kind') = 'comparison'
);

INSERT INTO speeds
SELECT body->>'id', body->>'$.spec.subject_id', rate->>'phase',
       (rate->>'base_tokens_per_second')::DOUBLE, (rate->>'fused_tokens_per_second')::DOUBLE,
       (rate->>'ratio')::DOUBLE, (rate->>'low')::DOUBLE, (rate->>'high')::DOUBLE,
       (body->>'$.spec.prompt_tokens')::BIGINT, (body->>'$.spec.new_tokens')::BIGINT,
       (body->>'$.spec.batch_size')::BIGINT, (body->>'$.built.base_bytes')::BIGINT,
       (body->>'$.built.added_bytes')::BIGINT, (body->>'$.built.base_working_bytes')::BIGINT,
       (body->>'$.built.fused_working_bytes')::BIGINT, (body->>'$.built.stored_bytes')::BIGINT,
       body->>'$.built.device', (body->>'$.built.num_threads')::INTEGER, body->>'$.built.dtype',
       recorded_at, run_id, sha256
FROM (
    SELECT body, recorded_at, run_id, sha256, unnest((body->'$.built.rates')::JSON[]) AS rate
    FROM fresh WHERE kind = 'artifact' AND (body->>'kind') = 'speed'
);

INSERT INTO routing_details
SELECT router_id, one->>'module', (one->>'entropy_bits')::DOUBLE, (one->>'weight')::DOUBLE,
       (one->>'agreement')::DOUBLE, sha256
FROM (
    SELECT sha256, body->>'$.spec.router_id' AS router_id,
           unnest((body->'$.built.details')::JSON[]) AS one
    FROM fresh WHERE kind = 'artifact' AND (body->>'kind') = 'routing'
);

INSERT INTO routing_switches
SELECT router_id, one->>'expert', (one->>'in_answer')::BOOLEAN, (one->>'delay_tokens')::BIGINT,
       (one->>'count')::BIGINT, sha256
FROM (
    SELECT sha256, body->>'$.spec.router_id' AS router_id,
           unnest((body->'$.built.switches')::JSON[]) AS one
    FROM fresh WHERE kind = 'artifact' AND (body->>'kind') = 'routing'
);

INSERT INTO routing_counts
SELECT count->>'router_id', count->>'module', count->>'truth', count->>'chosen',
       (count->>'num_tokens')::BIGINT, sha256
FROM (
    SELECT sha256, unnest((body->'counts')::JSON[]) AS count FROM fresh WHERE kind = 'routing'
);

INSERT INTO verdicts
SELECT body->>'name', body->>'source', body->>'repo_id', body->>'revision', body->>'subfolder',
       body->>'verdict', body->>'licence', body->>'author', body->>'adapter_id', recorded_at, run_id, sha256,
       coalesce((body->'base_models')::VARCHAR[], []), (body->>'downloads')::BIGINT
FROM fresh WHERE kind = 'adapter';

INSERT INTO verdict_reasons
SELECT position, reason->>'code', reason->>'message', sha256
FROM (
    SELECT sha256, unnest((body->'reasons')::JSON[]) AS reason,
           unnest(range(len((body->'reasons')::JSON[]))) AS position
    FROM fresh WHERE kind = 'adapter'
);

INSERT INTO run_starts
SELECT body->>'run_id', body->>'recipe_name', body->>'recipe_sha256',
       (body->'versions')::MAP(VARCHAR, VARCHAR), body->>'device', recorded_at, sha256
FROM fresh WHERE kind = 'run-started';

INSERT INTO run_ends
SELECT body->>'run_id', body->>'outcome', body->>'reason', (body->>'wall_seconds')::DOUBLE, recorded_at,
       sha256
FROM fresh WHERE kind = 'run-ended';

INSERT INTO run_stages
SELECT run_id, position, stage->>'stage', (stage->>'wall_seconds')::DOUBLE, sha256
FROM (
    SELECT sha256, body->>'run_id' AS run_id, unnest((body->'stages')::JSON[]) AS stage,
           unnest(range(len((body->'stages')::JSON[]))) AS position
    FROM fresh WHERE kind = 'run-ended'
);

INSERT INTO published
SELECT body->>'artifact_id', body->>'repo_id', body->>'revision', recorded_at, run_id, sha256
FROM fresh WHERE kind = 'publication';

INSERT INTO failed
SELECT body->>'stage', body->>'subject', body->>'error', body->>'message', recorded_at, run_id, sha256
FROM fresh WHERE kind = 'failure';

CREATE OR REPLACE TEMP TABLE overruled AS
WITH touched AS (
    SELECT DISTINCT kind, subject FROM fresh WHERE kind IN ('artifact', 'score', 'routing', 'publication', 'run-started', 'run-ended')
)
SELECT sha256 FROM records SEMI JOIN touched USING (kind, subject)
QUALIFY row_number() OVER (PARTITION BY kind, subject ORDER BY recorded_at, sha256) > 1;

-- which boards have to be ranked again: of new scores, and of what is now known about old ones
CREATE OR REPLACE TEMP TABLE concerned AS
WITH named AS (
    SELECT body->>'id' AS id FROM fresh WHERE kind = 'artifact'
    UNION SELECT id FROM artifacts WHERE record_sha256 IN (FROM overruled)
)
FROM named UNION SELECT routers.id FROM routers SEMI JOIN named ON fused_id = named.id;

INSERT INTO unsettled
SELECT task, metric, num_fewshot, max_new_tokens, template, rows_sha256 FROM measured
UNION
SELECT task, metric, num_fewshot, max_new_tokens, template, rows_sha256 FROM scores
WHERE record_sha256 IN (FROM overruled)
UNION
SELECT task, metric, num_fewshot, max_new_tokens, template, rows_sha256 FROM scores
SEMI JOIN concerned ON concerned.id = scores.subject_id
UNION
SELECT task, metric, num_fewshot, max_new_tokens, template, rows_sha256 FROM scores
WHERE run_id IN (SELECT run_id FROM fresh WHERE kind = 'run-started');

DELETE FROM artifacts WHERE record_sha256 IN (FROM overruled);
DELETE FROM parents WHERE record_sha256 IN (FROM overruled);
DELETE FROM base_models WHERE record_sha256 IN (FROM overruled);
DELETE FROM adapter_weights WHERE record_sha256 IN (FROM overruled);
DELETE FROM experts WHERE record_sha256 IN (FROM overruled);
DELETE FROM routers WHERE record_sha256 IN (FROM overruled);
DELETE FROM scores WHERE record_sha256 IN (FROM overruled);
DELETE FROM score_parts WHERE record_sha256 IN (FROM overruled);
DELETE FROM merges WHERE record_sha256 IN (FROM overruled);
DELETE FROM comparisons WHERE record_sha256 IN (FROM overruled);
DELETE FROM speeds WHERE record_sha256 IN (FROM overruled);
DELETE FROM routing_counts WHERE record_sha256 IN (FROM overruled);
DELETE FROM routing_details WHERE record_sha256 IN (FROM overruled);
DELETE FROM routing_switches WHERE record_sha256 IN (FROM overruled);
DELETE FROM run_starts WHERE record_sha256 IN (FROM overruled);
DELETE FROM run_ends WHERE record_sha256 IN (FROM overruled);
DELETE FROM run_stages WHERE record_sha256 IN (FROM overruled);

DELETE FROM published WHERE record_sha256 IN (FROM overruled);

-- whatever has new parents, and all that was made from it, has new ancestors
CREATE OR REPLACE TEMP TABLE made AS
WITH children AS (
    SELECT body->>'id' AS id FROM fresh
    WHERE kind = 'artifact' AND json_array_length(body->'parents') > 0
)
FROM children UNION SELECT descendant_id FROM ancestors SEMI JOIN children ON ancestor_id = id;

DELETE FROM ancestors WHERE descendant_id IN (FROM made);

INSERT INTO ancestors
WITH RECURSIVE steps(descendant_id, ancestor_id, depth) AS (
    SELECT child_id, parent_id, 1 FROM parents SEMI JOIN made ON child_id = id
    UNION
    SELECT steps.descendant_id, parents.parent_id, steps.depth + 1
    FROM steps JOIN parents ON parents.child_id = steps.ancestor_id
    WHERE steps.depth < 32 -- ids are hashes of what they are made from: no cycle is honest
)
SELECT descendant_id, ancestor_id, min(depth) FROM steps GROUP BY ALL;

DROP TABLE fresh;
DROP TABLE measured;
DROP TABLE concerned;
DROP TABLE overruled;
DROP TABLE made;
