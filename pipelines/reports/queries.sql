-- The queries of a report, each below its name and its title; $router is an artifact id.

-- base: The base model
SELECT base_model, base_revision, architecture, hidden_size, num_hidden_layers, vocab_size,
       weights_sha256
FROM lineage JOIN base_models ON base_models.id = relative_id
WHERE artifact_id = $router AND relation = 'made from';

-- router: How it routes
SELECT router, top_k, temperature, method, composites, num_tokens, heldout_accuracy, wall_seconds,
       device
FROM routers WHERE id = $router;

-- experts: The experts
SELECT position + 1 AS number, name, source, revision, licence, min_r, max_r, num_modules, dtype,
       CASE WHEN list_contains(stand_ins, name) THEN stand_in
            WHEN router = 'gate' THEN 'examples' END AS gate_from
FROM routers
JOIN experts USING (fused_id)
LEFT JOIN adapter_weights ON adapter_weights.id = adapter_id
LEFT JOIN lineage ON relative_id = adapter_id AND artifact_id = routers.id
WHERE routers.id = $router ORDER BY position;

-- adapters: The adapters that were checked
WITH latest AS (
    SELECT verdicts.*
    FROM verdicts JOIN artifacts ON artifacts.id = $router AND artifacts.run_id = verdicts.run_id
    QUALIFY row_number() OVER (
        PARTITION BY name ORDER BY verdicts.recorded_at DESC, verdicts.record_sha256
    ) = 1
), reason_texts AS (
    SELECT record_sha256, string_agg(message, '; ' ORDER BY position) AS reasons
    FROM verdict_reasons GROUP BY record_sha256
)
SELECT name, verdict, concat_ws('/', repo_id, nullif(subfolder, '')) AS source, revision, author,
       licence, array_to_string(base_models, ', ') AS base_models, downloads, reasons
FROM latest LEFT JOIN reason_texts USING (record_sha256)
ORDER BY list_position(['refuse', 'warn'], verdict) NULLS LAST, name;

-- scores: Scores and their 95 % intervals
SELECT task, system, metric, value, low, high, num_samples, num_empty, num_truncated
FROM latest_standings WHERE router_id = $router AND system <> 'alone'
ORDER BY list_position(['composite', 'conversation'], split_part(task, '-', 1)) NULLS FIRST,
         TRY_CAST(split_part(task, '-', 2) AS INTEGER) NULLS FIRST,
         task, list_position(['fused', 'oracle', 'base'], system), system, metric;

-- means: Means over the tasks on which every system was measured
WITH by_task AS (
    SELECT system, task, avg(value) AS value,  -- of its metrics, where none is tested
           any_value(num_samples) AS num_rows
    FROM (
        SELECT *, (task, metric) IN (
                   SELECT (task, metric) FROM comparisons WHERE subject_id = $router) AS is_tested
        FROM latest_standings
        WHERE router_id = $router AND system <> 'alone' AND higher_is_better
          AND NOT regexp_matches(metric, '^(composite|conversation)_')  -- of one question a row
    )
    GROUP BY system, task, is_tested
    QUALIFY is_tested = bool_or(is_tested) OVER (PARTITION BY system, task)
), asked AS (
    SELECT task, list(system ORDER BY system) AS systems FROM by_task GROUP BY task
), together AS (  -- as many systems as were asked one task; of as many those with the most tasks
    SELECT systems FROM asked GROUP BY systems
    ORDER BY len(systems) DESC, count(*) DESC, systems LIMIT 1
)
SELECT system, avg(value) AS mean, count(*) AS num_tasks, min(num_rows) AS fewest_rows,
       max(num_rows) AS most_rows
FROM by_task JOIN asked USING (task) JOIN together USING (systems)
GROUP BY system
ORDER BY list_position(['fused', 'oracle', 'base'], system), mean DESC, system;

-- differences: The fused model against each other system, on the same rows
SELECT other, task, metric, difference, low, high, p_holm, test, num_samples, higher_is_better
FROM latest_comparisons
WHERE subject_id = $router
ORDER BY list_position(['oracle', 'base'], other), other, task, metric;

-- matrix: Each adapter alone on each task
SELECT task, expert, metric, value, low, high, num_samples
FROM latest_standings WHERE router_id = $router AND expert <> ''
ORDER BY task, metric, expert;

-- composites: Several questions in one prompt
SELECT latest.task, system,
       max(latest.value) FILTER (latest.metric <> 'composite_attempted') AS answered_right,
       max(latest.value) FILTER (latest.metric = 'composite_attempted') AS attempted,
       max(latest.num_samples) AS num_prompts,
       max(mean_prompt_tokens) AS mean_prompt_tokens, max(max_prompt_tokens) AS max_prompt_tokens,
       max(latest.num_truncated) AS num_truncated
FROM latest_standings AS latest JOIN scores ON scores.id = score_id
WHERE router_id = $router AND system <> 'alone' AND starts_with(latest.task, 'composite-')
GROUP BY latest.task, system
ORDER BY TRY_CAST(split_part(latest.task, '-', 2) AS INTEGER), latest.task,
         list_position(['fused', 'base'], system), system;

-- conversations: Conversations turn by turn
SELECT task, system, turn, value, num_conversations, prompt_tokens, computed_tokens, new_tokens,
       seconds
FROM conversation_turns SEMI JOIN latest_standings USING (router_id, system, score_id)
WHERE router_id = $router
ORDER BY TRY_CAST(split_part(task, '-', 2) AS INTEGER), task,
         list_position(['fused', 'oracle', 'base'], system), system, turn;

-- parts: The fused model on the parts of composites and conversations
SELECT task, name, score_parts.value, score_parts.num_samples, num_attempted
FROM latest_standings JOIN score_parts USING (score_id)
WHERE router_id = $router AND system = 'fused' AND metric <> 'composite_attempted'
ORDER BY TRY_CAST(split_part(task, '-', 2) AS INTEGER), task, position;

-- accuracy: How many tokens reach their own expert
SELECT truth AS expert,
       coalesce(sum(num_tokens) FILTER (truth = chosen), 0) / sum(num_tokens) AS accuracy,
       max(num_fed) AS num_tokens
FROM (
    SELECT truth, chosen, num_tokens,
           sum(num_tokens) OVER (PARTITION BY module, truth) AS num_fed
    FROM routing_counts WHERE router_id = $router
)
GROUP BY truth ORDER BY accuracy DESC, truth;

-- overall: How many tokens reach their own expert in all
SELECT coalesce(sum(num_tokens) FILTER (truth = chosen), 0) / sum(num_tokens) AS accuracy,
       sum(num_tokens) AS num_pairs, count(DISTINCT module) AS num_modules
FROM routing_counts WHERE router_id = $router;

-- confusion: Where the tokens of each expert's rows are sent
SELECT truth, chosen, sum(num_tokens) AS num_pairs,
       sum(num_tokens) / sum(sum(num_tokens)) OVER (PARTITION BY truth) AS share
FROM routing_counts WHERE router_id = $router GROUP BY truth, chosen ORDER BY truth, chosen;

-- layers: Routing accuracy by layer and kind of module
SELECT TRY_CAST(regexp_extract(module, '\.(\d+)\.', 1) AS INTEGER) AS layer,
       split_part(module, '.', -1) AS module_kind,
       coalesce(sum(num_tokens) FILTER (truth = chosen), 0) / sum(num_tokens) AS accuracy
FROM routing_counts WHERE router_id = $router
GROUP BY GROUPING SETS ((layer, module_kind), (layer)) ORDER BY layer, module_kind;

-- load: How tokens are spread over the experts
SELECT expert, fed / sum(fed) OVER () AS own, received / sum(received) OVER () AS sent
FROM (
    SELECT expert, sum(num_tokens) FILTER (expert = truth) AS fed,
           sum(num_tokens) FILTER (expert = chosen) AS received
    FROM routing_counts, unnest(list_distinct([truth, chosen])) AS of_a_token(expert)
    WHERE router_id = $router GROUP BY expert
)
ORDER BY expert;

-- entropy: How evenly tokens are spread over the experts, in bits
WITH choices AS (  -- all experts, and their mean and the base where tokens go there
    SELECT name FROM experts JOIN routers USING (fused_id) WHERE routers.id = $router
    UNION
    SELECT chosen FROM routing_counts WHERE router_id = $router
), tokens AS (
    SELECT name, sum(num_tokens) FILTER (name = truth) AS fed,
           sum(num_tokens) FILTER (name = chosen) AS received
    FROM routing_counts, unnest(list_distinct([truth, chosen])) AS of_a_token(name)
    WHERE router_id = $router GROUP BY name
), shares AS (
    SELECT fed / sum(fed) OVER () AS own, received / sum(received) OVER () AS sent
    FROM choices LEFT JOIN tokens USING (name)
)
SELECT -sum(own * log2(nullif(own, 0))) AS own_bits, -sum(sent * log2(nullif(sent, 0))) AS sent_bits,
       log2(count(*)) AS most_bits, count(*) AS num_choices
FROM shares;

-- details: How surely each layer decides, and whether the layers agree
SELECT TRY_CAST(regexp_extract(module, '\.(\d+)\.', 1) AS INTEGER) AS layer,
       avg(entropy_bits) AS entropy_bits, avg(weight) AS weight, avg(agreement) AS agreement
FROM routing_details SEMI JOIN latest_routing USING (router_id, record_sha256)
WHERE router_id = $router GROUP BY layer ORDER BY layer;

-- switches: Tokens until routing switches, where another task's text begins
SELECT *, sum(in_question) OVER sofar / nullif(sum(in_question) OVER (), 0) AS question_share,
       sum(in_answer) OVER sofar / nullif(sum(in_answer) OVER (), 0) AS answer_share
FROM (
    SELECT delay_tokens,
           coalesce(sum(num_switches) FILTER (NOT in_answer), 0) AS in_question,
           coalesce(sum(num_switches) FILTER (in_answer), 0) AS in_answer
    FROM routing_switches SEMI JOIN latest_routing USING (router_id, record_sha256)
    WHERE router_id = $router GROUP BY delay_tokens
)
WINDOW sofar AS (ORDER BY delay_tokens NULLS LAST)
ORDER BY delay_tokens NULLS LAST;

-- abstention: Whether the base has the prompts that are no expert's
SELECT auroc, num_nobodys, num_own, nobodys_share, own_share
FROM abstentions SEMI JOIN latest_routing USING (router_id, record_sha256)
WHERE router_id = $router;

-- failures: Where routing goes wrong most
SELECT expert, layer, string_agg(split_part(module, '.', -1), ', ' ORDER BY module) AS modules,
       accuracy, num_tokens
FROM routing WHERE router_id = $router AND num_tokens > 0
GROUP BY expert, layer, accuracy, num_tokens ORDER BY accuracy, layer, expert, modules LIMIT 10;

-- speed: What routing costs
SELECT phase, base_tokens_per_second, fused_tokens_per_second, ratio, low, high, prompt_tokens,
       new_tokens, batch_size, base_bytes, added_bytes, base_working_bytes, fused_working_bytes,
       stored_bytes, device, num_threads, dtype
FROM speeds WHERE subject_id = $router
QUALIFY id = arg_max(id, (recorded_at, id)) OVER () ORDER BY phase DESC;

-- stages: How long the run took
SELECT stage, run_stages.wall_seconds
FROM artifacts JOIN run_stages USING (run_id)
WHERE id = $router ORDER BY position;

-- lineage: What it was made from
SELECT depth, kind, source, revision, licence, weights_sha256, relative_id AS id, recorded_at
FROM lineage WHERE artifact_id = $router AND relation IN ('itself', 'made from')
ORDER BY depth, kind, source, id;

-- versions: What it was made with
SELECT unnest(map_keys(versions)) AS package, unnest(map_values(versions)) AS version,
       runs.device, runs.run_id, recipe_name, recipe_sha256
FROM artifacts JOIN runs USING (run_id) WHERE id = $router ORDER BY package;

-- outputs: Where the answers are stored
SELECT task, outputs_sha256, max_new_tokens, templated, system_prompt,
       id IN (SELECT score_id FROM score_parts) AS is_composite,
       id IN (SELECT score_id FROM score_turns) AS is_conversation
FROM scores
WHERE id IN (SELECT score_id FROM latest_standings WHERE router_id = $router AND system = 'fused')
QUALIFY row_number() OVER (PARTITION BY task ORDER BY recorded_at DESC, metric) = 1
ORDER BY is_conversation DESC, is_composite DESC,
         TRY_CAST(split_part(task, '-', 2) AS INTEGER) NULLS FIRST, task;
