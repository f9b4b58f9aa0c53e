-- Questions that people ask, each below its title. `meteora sql --examples` shows them.

-- Which routed model is best on each task, and how far is it from the base and the oracle?
SELECT task, metric, num_samples, short(subject_id) AS model, round(value, 3) AS score,
       round(low, 3) AS low, round(high, 3) AS high, round(base_value, 3) AS base,
       round(oracle_value, 3) AS oracle
FROM leaderboard WHERE place = 1 ORDER BY task, metric, num_samples DESC, model;

-- How do my models compare on the mean over their tasks, beside the base and the oracle?
SELECT short(subject_id) AS model, router, num_tasks AS tasks, round(value, 3) AS score,
       round(base_value, 3) AS base, round(oracle_value, 3) AS oracle
FROM means ORDER BY value DESC, subject_id LIMIT 20;

-- On which tasks is a routed model significantly worse than the right adapter alone?
SELECT task, short(subject_id) AS model, round(difference, 3) AS difference, round(low, 3) AS low,
       round(high, 3) AS high, p_holm AS p
FROM latest_comparisons
WHERE other = 'oracle' AND p_holm < 0.05 AND (difference < 0) = higher_is_better
ORDER BY task, model LIMIT 100;

-- Where does a routed model differ from the base, the oracle or another control beyond chance?
SELECT short(subject_id) AS model, other, task, round(difference, 3) AS difference,
       p_holm AS p
FROM latest_comparisons WHERE p_holm < 0.05 ORDER BY model, other, difference;

-- What does routing cost in time and space?
SELECT short(subject_id) AS model, phase, round(fused_tokens_per_second) AS tokens_per_second,
       round(ratio, 2) AS times_base, round(added_bytes / 1e6, 1) AS added_mb, device
FROM speeds ORDER BY ALL;

-- How does a model do at each turn of a conversation, and how much does it compute?
SELECT short(router_id) AS model, task, system, turn, round(value, 3) AS score,
       round(computed_tokens) AS computed_tokens, round(seconds, 3) AS seconds
FROM conversation_turns WHERE system IN ('fused', 'oracle', 'swap')
QUALIFY rows_sha256 = arg_max(rows_sha256, recorded_at) OVER (PARTITION BY router_id, task)
ORDER BY ALL;

-- What is the latest model made from, down to commit, hash and licence?
SELECT depth, kind, source, revision, licence, weights_sha256
FROM lineage
WHERE relation = 'made from'
  AND artifact_id = (SELECT id FROM artifacts WHERE kind = 'router' ORDER BY recorded_at DESC LIMIT 1)
ORDER BY depth, kind, source;

-- Which expert got the prompts of a pool, and how clearly does it stand out on them?
SELECT short(pool_id) AS pool, expert, num_prompts, num_clusters, round(score, 2) AS score,
       round(lead, 2) AS lead
FROM pool_shares ORDER BY pool, num_prompts DESC, expert;

-- Which models contain an adapter, so that I know what to withdraw when its licence changes?
SELECT adapters.name, licence, kind, short(id) AS used_in
FROM adapters JOIN experts USING (adapter_id)
JOIN (SELECT id, id AS fused_id, kind FROM artifacts WHERE kind = 'fused'
      UNION ALL SELECT id, fused_id, 'router' FROM routers) USING (fused_id)
ORDER BY ALL LIMIT 1000;

-- Which adapters were refused, and why?
SELECT name, repo_id, codes, messages FROM adapters WHERE verdict = 'refuse';

-- Under which licences are the adapters that are in use?
SELECT licence, count(DISTINCT adapter_id) AS adapters
FROM adapters WHERE num_fused > 0 GROUP BY ALL ORDER BY ALL;

-- Where does routing go wrong most?
SELECT short(router_id) AS model, expert, layer, module, round(accuracy, 3) AS accuracy, num_tokens
FROM routing WHERE num_tokens > 0 ORDER BY routing.accuracy, module, expert, model LIMIT 10;

-- How are tokens spread over the experts, and how many reach their own?
SELECT short(router_id) AS model, expert, round(sum(load) / any_value(num_modules), 3) AS load,
       round(sum(accuracy * num_tokens) / sum(num_tokens), 3) AS accuracy
FROM (SELECT *, count(DISTINCT module) OVER (PARTITION BY router_id) AS num_modules FROM routing)
GROUP BY ALL ORDER BY ALL;

-- Which experts take each other's tokens?
SELECT short(router_id) AS model, truth, chosen, round(sum(num_tokens) / any_value(of_truth), 4) AS share
FROM (SELECT *, sum(num_tokens) OVER (PARTITION BY router_id, truth) AS of_truth FROM routing_counts)
WHERE truth <> chosen
GROUP BY router_id, truth, chosen ORDER BY share DESC, model, truth, chosen LIMIT 10;

-- Which models recognise a prompt that belongs to no expert?
SELECT short(router_id) AS model, round(auroc, 3) AS auroc, num_nobodys, num_own,
       round(nobodys_share, 2) AS nobodys_share, round(own_share, 2) AS own_share
FROM abstentions SEMI JOIN latest_routing USING (router_id, record_sha256)
ORDER BY abstentions.auroc DESC, model;

-- What ran lately, and how did it end?
SELECT started_at, recipe_name, outcome, reason, round(wall_seconds, 1) AS seconds FROM runs LIMIT 10;

-- Where do runs spend their time?
SELECT stage, count(*) AS runs, round(median(wall_seconds), 1) AS median_seconds
FROM run_stages GROUP BY stage ORDER BY median_seconds DESC, stage;

-- What went wrong?
SELECT recorded_at, recipe_name, stage, subject, error, message FROM failures LIMIT 10;

-- Which scores fell significantly since the recipe's previous checkpoint?
SELECT recipe_name, task, round(previous_value, 3) AS before, round(value, 3) AS now FROM regressions;

-- Where is everything published?
SELECT short(artifact_id) AS artifact, repo_id, revision, recorded_at FROM publications;

-- What does each column mean?
SELECT column_name, data_type, meaning FROM dictionary WHERE name = 'leaderboard';
