-- What the Hub says of the repository that an adapter is from.

ALTER TABLE verdicts ADD COLUMN base_models VARCHAR[] DEFAULT [];
ALTER TABLE verdicts ADD COLUMN downloads BIGINT;
COMMENT ON COLUMN verdicts.base_models IS 'Bases that its card names, unchecked; empty where it names none or nobody was asked';
COMMENT ON COLUMN verdicts.downloads IS 'Number of downloads of its repository in the 30 days before, as the Hub counts; NULL where it did not say';
