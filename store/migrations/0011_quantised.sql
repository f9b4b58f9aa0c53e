-- Bases whose linear layers are made smaller when they are loaded.

ALTER TABLE base_models ADD COLUMN quantise VARCHAR;
COMMENT ON COLUMN base_models.quantise IS 'What its linear layers are when it is loaded, 4bit or 8bit; empty, or NULL in older records, for as its files are';
