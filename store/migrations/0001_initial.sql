-- The tables of the index. Each row comes from one record, named by record_sha256, and nothing is
-- ever updated. No foreign keys: DuckDB checks them too eagerly; `meteora verify` looks instead.

CREATE TABLE migrations (number INTEGER, name VARCHAR NOT NULL, sha256 VARCHAR NOT NULL);
COMMENT ON TABLE migrations IS 'Which files made the tables and the views';
COMMENT ON COLUMN migrations.number IS 'Place in the order of migrations; 0 for the views';
COMMENT ON COLUMN migrations.name IS 'File name';
COMMENT ON COLUMN migrations.sha256 IS 'SHA-256 of the file, 64 hex digits';

CREATE TABLE records (
    sha256 VARCHAR PRIMARY KEY,
    kind VARCHAR NOT NULL,
    version INTEGER NOT NULL,
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    subject VARCHAR NOT NULL
);
COMMENT ON TABLE records IS 'Every record that has been read into this index';
COMMENT ON COLUMN records.sha256 IS 'SHA-256 of the record''s bytes and the name of its file, 64 hex digits';
COMMENT ON COLUMN records.kind IS 'artifact, score, routing, adapter, publication, run-started, run-ended or failure';
COMMENT ON COLUMN records.version IS 'Version of the shape of its body';
COMMENT ON COLUMN records.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN records.run_id IS 'The run that recorded it';
COMMENT ON COLUMN records.subject IS 'What it is about: an artifact id, a run id, an adapter at its revision';

CREATE TABLE rejected (sha256 VARCHAR PRIMARY KEY, reason VARCHAR NOT NULL);
COMMENT ON TABLE rejected IS 'Records that this release could not read into its tables';
COMMENT ON COLUMN rejected.sha256 IS 'SHA-256 of the record''s bytes and the name of its file, 64 hex digits';
COMMENT ON COLUMN rejected.reason IS 'What was wrong, a sentence';

CREATE TABLE artifacts (
    id VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    weights_sha256 VARCHAR NOT NULL,
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE artifacts IS 'What has been made: bases, adapters, fused checkpoints, routers';
COMMENT ON COLUMN artifacts.id IS 'Hash of what was asked for, <kind>:<64 hex digits>';
COMMENT ON COLUMN artifacts.kind IS 'base, adapter, fused or router';
COMMENT ON COLUMN artifacts.weights_sha256 IS 'SHA-256 of the bytes that came out, 64 hex digits; empty where there are none';
COMMENT ON COLUMN artifacts.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN artifacts.run_id IS 'The run that made it';
COMMENT ON COLUMN artifacts.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE parents (
    child_id VARCHAR NOT NULL,
    parent_id VARCHAR NOT NULL,
    position INTEGER NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE parents IS 'What each artifact was made from';
COMMENT ON COLUMN parents.child_id IS 'Artifact id of what was made';
COMMENT ON COLUMN parents.parent_id IS 'Artifact id of what it was made from';
COMMENT ON COLUMN parents.position IS 'Place among the child''s parents, from 0';
COMMENT ON COLUMN parents.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE base_models (
    id VARCHAR NOT NULL,
    base_model VARCHAR NOT NULL,
    base_revision VARCHAR NOT NULL,
    architecture VARCHAR,
    hidden_size INTEGER,
    num_hidden_layers INTEGER,
    vocab_size INTEGER,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE base_models IS 'Frozen base models, each at one revision';
COMMENT ON COLUMN base_models.id IS 'Artifact id';
COMMENT ON COLUMN base_models.base_model IS 'Hub id, gguf:<package>/<file>, or path:<folder name>';
COMMENT ON COLUMN base_models.base_revision IS 'Commit of 40 hex digits, or sha256: and the hash of its weights';
COMMENT ON COLUMN base_models.architecture IS 'Class of the model in transformers; NULL where not known';
COMMENT ON COLUMN base_models.hidden_size IS 'Width of the hidden state, in numbers';
COMMENT ON COLUMN base_models.num_hidden_layers IS 'Number of layers';
COMMENT ON COLUMN base_models.vocab_size IS 'Number of tokens in the vocabulary';
COMMENT ON COLUMN base_models.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE adapter_weights (
    id VARCHAR NOT NULL,
    base_model VARCHAR NOT NULL,
    use_rslora BOOLEAN NOT NULL,
    dtype VARCHAR NOT NULL,
    num_modules INTEGER NOT NULL,
    min_r INTEGER,
    max_r INTEGER,
    num_stripped INTEGER NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE adapter_weights IS 'Adapters as their tensors say they are';
COMMENT ON COLUMN adapter_weights.id IS 'Artifact id';
COMMENT ON COLUMN adapter_weights.base_model IS 'The base that its config claims, unchecked; empty where it claims none';
COMMENT ON COLUMN adapter_weights.use_rslora IS 'Whether scaling is alpha / sqrt(r) instead of alpha / r';
COMMENT ON COLUMN adapter_weights.dtype IS 'F32, F16 or BF16';
COMMENT ON COLUMN adapter_weights.num_modules IS 'Number of linear layers that it changes';
COMMENT ON COLUMN adapter_weights.min_r IS 'Smallest rank of any of its layers';
COMMENT ON COLUMN adapter_weights.max_r IS 'Largest rank of any of its layers';
COMMENT ON COLUMN adapter_weights.num_stripped IS 'Number of tensors of its file that are left out by policy';
COMMENT ON COLUMN adapter_weights.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE experts (
    fused_id VARCHAR NOT NULL,
    position INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    adapter_id VARCHAR NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE experts IS 'The adapters of each fused checkpoint, in the order of the stack';
COMMENT ON COLUMN experts.fused_id IS 'Artifact id of the fused checkpoint';
COMMENT ON COLUMN experts.position IS 'Number of the expert in every gate, from 0';
COMMENT ON COLUMN experts.name IS 'Name of the expert in this checkpoint';
COMMENT ON COLUMN experts.adapter_id IS 'Artifact id of the adapter';
COMMENT ON COLUMN experts.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE routers (
    id VARCHAR NOT NULL,
    fused_id VARCHAR NOT NULL,
    router VARCHAR NOT NULL,
    top_k INTEGER NOT NULL,
    temperature DOUBLE NOT NULL CHECK (isfinite(temperature)),
    method VARCHAR NOT NULL,
    examples_sha256 VARCHAR NOT NULL,
    seed BIGINT NOT NULL,
    num_tokens BIGINT,
    heldout_accuracy DOUBLE CHECK (isfinite(heldout_accuracy)),
    wall_seconds DOUBLE CHECK (isfinite(wall_seconds)),
    device VARCHAR,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE routers IS 'How a fused checkpoint routes, and how its gates were made';
COMMENT ON COLUMN routers.id IS 'Artifact id';
COMMENT ON COLUMN routers.fused_id IS 'Artifact id of the fused checkpoint';
COMMENT ON COLUMN routers.router IS 'gate, arrow, norm, fixed or uniform';
COMMENT ON COLUMN routers.top_k IS 'Number of experts chosen for a token';
COMMENT ON COLUMN routers.temperature IS 'Temperature of the softmax, no unit';
COMMENT ON COLUMN routers.method IS 'calibrate or joint; empty without gates';
COMMENT ON COLUMN routers.examples_sha256 IS 'SHA-256 of the examples, 64 hex digits; empty without gates';
COMMENT ON COLUMN routers.seed IS 'Seed of the random numbers';
COMMENT ON COLUMN routers.num_tokens IS 'Number of tokens that the gates were fitted on';
COMMENT ON COLUMN routers.heldout_accuracy IS 'Share of held-out (input point, token) pairs that went to their own expert, 0 to 1';
COMMENT ON COLUMN routers.wall_seconds IS 'Time that the fit took, in seconds';
COMMENT ON COLUMN routers.device IS 'What the fit ran on';
COMMENT ON COLUMN routers.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE scores (
    id VARCHAR NOT NULL,
    subject_id VARCHAR NOT NULL,
    base_id VARCHAR NOT NULL,
    task VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    num_fewshot INTEGER NOT NULL,
    max_new_tokens INTEGER NOT NULL,
    seed BIGINT NOT NULL,
    rows_sha256 VARCHAR NOT NULL,
    value DOUBLE NOT NULL CHECK (isfinite(value)),
    stderr DOUBLE NOT NULL CHECK (isfinite(stderr)),
    low DOUBLE NOT NULL CHECK (isfinite(low)),
    high DOUBLE NOT NULL CHECK (isfinite(high)),
    num_samples BIGINT NOT NULL,
    outputs_sha256 VARCHAR NOT NULL,
    harness VARCHAR NOT NULL,
    wall_seconds DOUBLE NOT NULL CHECK (isfinite(wall_seconds)),
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE scores IS 'Numbers with their circumstances';
COMMENT ON COLUMN scores.id IS 'Benchmark id, benchmark:<64 hex digits>';
COMMENT ON COLUMN scores.subject_id IS 'Artifact id of what was measured: a base, an adapter alone, or a router';
COMMENT ON COLUMN scores.base_id IS 'Artifact id of the base that it ran on';
COMMENT ON COLUMN scores.task IS 'Name of the task';
COMMENT ON COLUMN scores.metric IS 'Name of the metric, as the harness calls it';
COMMENT ON COLUMN scores.num_fewshot IS 'Number of solved examples in each prompt';
COMMENT ON COLUMN scores.max_new_tokens IS 'Length at which an answer is cut, in tokens';
COMMENT ON COLUMN scores.seed IS 'Seed of the random numbers';
COMMENT ON COLUMN scores.rows_sha256 IS 'SHA-256 of the rows that were asked, 64 hex digits';
COMMENT ON COLUMN scores.value IS 'The score, in the metric''s unit';
COMMENT ON COLUMN scores.stderr IS 'Its standard error, in the metric''s unit';
COMMENT ON COLUMN scores.low IS 'Lower end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN scores.high IS 'Upper end of its 95 % interval, in the metric''s unit';
COMMENT ON COLUMN scores.num_samples IS 'Number of rows that were asked';
COMMENT ON COLUMN scores.outputs_sha256 IS 'SHA-256 of the blob with each row''s output, 64 hex digits';
COMMENT ON COLUMN scores.harness IS 'Name and version of the harness';
COMMENT ON COLUMN scores.wall_seconds IS 'Time that the measurement took, in seconds';
COMMENT ON COLUMN scores.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN scores.run_id IS 'The run that measured it';
COMMENT ON COLUMN scores.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE routing_counts (
    router_id VARCHAR NOT NULL,
    module VARCHAR NOT NULL,
    truth VARCHAR NOT NULL,
    chosen VARCHAR NOT NULL,
    num_tokens BIGINT NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE routing_counts IS 'How often tokens of one expert''s rows were sent to one expert, at one module';
COMMENT ON COLUMN routing_counts.router_id IS 'Artifact id of the router';
COMMENT ON COLUMN routing_counts.module IS 'Path of the linear layer in the base model';
COMMENT ON COLUMN routing_counts.truth IS 'Name of the expert whose test rows these are';
COMMENT ON COLUMN routing_counts.chosen IS 'Name of the expert with the largest logit';
COMMENT ON COLUMN routing_counts.num_tokens IS 'Number of tokens, without the template''s opening';
COMMENT ON COLUMN routing_counts.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE verdicts (
    name VARCHAR NOT NULL,
    source VARCHAR NOT NULL,
    repo_id VARCHAR NOT NULL,
    revision VARCHAR NOT NULL,
    subfolder VARCHAR NOT NULL,
    verdict VARCHAR NOT NULL,
    licence VARCHAR NOT NULL,
    author VARCHAR NOT NULL,
    adapter_id VARCHAR,
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE verdicts IS 'What was decided about each adapter, each time that it was seen';
COMMENT ON COLUMN verdicts.name IS 'Name of the adapter in the recipe';
COMMENT ON COLUMN verdicts.source IS 'The adapter as the recipe names it';
COMMENT ON COLUMN verdicts.repo_id IS 'owner/name on the Hub, or path:<folder name>';
COMMENT ON COLUMN verdicts.revision IS 'Commit of 40 hex digits, or sha256: and the hash of its weights';
COMMENT ON COLUMN verdicts.subfolder IS 'Folder inside the repository; empty for its root';
COMMENT ON COLUMN verdicts.verdict IS 'accept, warn or refuse';
COMMENT ON COLUMN verdicts.licence IS 'Licence that its card claims; empty where it claims none';
COMMENT ON COLUMN verdicts.author IS 'Who published it; empty where not known';
COMMENT ON COLUMN verdicts.adapter_id IS 'Artifact id; NULL where its tensors were never understood';
COMMENT ON COLUMN verdicts.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN verdicts.run_id IS 'The run that saw it';
COMMENT ON COLUMN verdicts.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE verdict_reasons (
    position INTEGER NOT NULL,
    code VARCHAR NOT NULL,
    message VARCHAR NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE verdict_reasons IS 'The reasons of each verdict';
COMMENT ON COLUMN verdict_reasons.position IS 'Place among the verdict''s reasons, from 0';
COMMENT ON COLUMN verdict_reasons.code IS 'Code of the reason';
COMMENT ON COLUMN verdict_reasons.message IS 'The reason as a sentence';
COMMENT ON COLUMN verdict_reasons.record_sha256 IS 'SHA-256 of the record of the verdict, 64 hex digits';

CREATE TABLE run_starts (
    run_id VARCHAR NOT NULL,
    recipe_name VARCHAR NOT NULL,
    recipe_sha256 VARCHAR NOT NULL,
    versions MAP(VARCHAR, VARCHAR) NOT NULL,
    device VARCHAR NOT NULL,
    recorded_at TIMESTAMP NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE run_starts IS 'Runs that began';
COMMENT ON COLUMN run_starts.run_id IS 'Id of the run';
COMMENT ON COLUMN run_starts.recipe_name IS 'Name of the recipe';
COMMENT ON COLUMN run_starts.recipe_sha256 IS 'SHA-256 of the recipe as it was resolved, 64 hex digits';
COMMENT ON COLUMN run_starts.versions IS 'Version of each package that the result depends on';
COMMENT ON COLUMN run_starts.device IS 'What it ran on';
COMMENT ON COLUMN run_starts.recorded_at IS 'When it began, UTC';
COMMENT ON COLUMN run_starts.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE run_ends (
    run_id VARCHAR NOT NULL,
    outcome VARCHAR NOT NULL,
    reason VARCHAR NOT NULL,
    wall_seconds DOUBLE CHECK (isfinite(wall_seconds)),
    recorded_at TIMESTAMP NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE run_ends IS 'Runs that ended, and how';
COMMENT ON COLUMN run_ends.run_id IS 'Id of the run';
COMMENT ON COLUMN run_ends.outcome IS 'ok, failed, refused or killed';
COMMENT ON COLUMN run_ends.reason IS 'Why, a sentence; empty where all went well';
COMMENT ON COLUMN run_ends.wall_seconds IS 'Time from beginning to end, in seconds; NULL where nobody was left to measure it';
COMMENT ON COLUMN run_ends.recorded_at IS 'When its end was recorded, UTC';
COMMENT ON COLUMN run_ends.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE run_stages (
    run_id VARCHAR NOT NULL,
    position INTEGER NOT NULL,
    stage VARCHAR NOT NULL,
    wall_seconds DOUBLE NOT NULL CHECK (isfinite(wall_seconds)),
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE run_stages IS 'How long each stage of a run took';
COMMENT ON COLUMN run_stages.run_id IS 'Id of the run';
COMMENT ON COLUMN run_stages.position IS 'Place among the stages that ran, from 0';
COMMENT ON COLUMN run_stages.stage IS 'Name of the stage';
COMMENT ON COLUMN run_stages.wall_seconds IS 'Time that it took, in seconds';
COMMENT ON COLUMN run_stages.record_sha256 IS 'SHA-256 of the record of the run''s end, 64 hex digits';

CREATE TABLE published (
    artifact_id VARCHAR NOT NULL,
    repo_id VARCHAR NOT NULL,
    revision VARCHAR NOT NULL,
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE published IS 'Where artifacts are published, whoever put them there';
COMMENT ON COLUMN published.artifact_id IS 'Artifact id';
COMMENT ON COLUMN published.repo_id IS 'owner/name on the Hub';
COMMENT ON COLUMN published.revision IS 'Commit of 40 hex digits';
COMMENT ON COLUMN published.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN published.run_id IS 'The run that published or found it';
COMMENT ON COLUMN published.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE failed (
    stage VARCHAR NOT NULL,
    subject VARCHAR NOT NULL,
    error VARCHAR NOT NULL,
    message VARCHAR NOT NULL,
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE failed IS 'What was refused or went wrong, whether or not the run went on';
COMMENT ON COLUMN failed.stage IS 'Name of the stage';
COMMENT ON COLUMN failed.subject IS 'What it happened to: an artifact id, an adapter''s source, a task';
COMMENT ON COLUMN failed.error IS 'Class of the exception, or a code';
COMMENT ON COLUMN failed.message IS 'What happened, a sentence';
COMMENT ON COLUMN failed.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN failed.run_id IS 'The run that it happened in';
COMMENT ON COLUMN failed.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';
