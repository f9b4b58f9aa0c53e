-- A default that calls a function, as [] does, keeps other DuckDBs from attaching to a served index.

ALTER TABLE verdicts ALTER COLUMN base_models DROP DEFAULT;
