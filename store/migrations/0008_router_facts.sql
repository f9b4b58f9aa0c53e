-- What gates were made from beyond each expert's own examples, and which experts had none.

ALTER TABLE routers ADD COLUMN composites INTEGER[];
ALTER TABLE routers ADD COLUMN stand_in VARCHAR;
ALTER TABLE routers ADD COLUMN stand_ins VARCHAR[];
COMMENT ON COLUMN routers.composites IS 'How many tasks the prompts hold that gates were also fitted to; NULL in an index older than this column';
COMMENT ON COLUMN routers.stand_in IS 'arrow or norm, by which experts without examples are told; empty where all had some';
COMMENT ON COLUMN routers.stand_ins IS 'Names of those experts';
