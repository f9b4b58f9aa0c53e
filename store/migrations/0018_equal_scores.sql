-- Scores that differ by rounding alone share a place: all boards are ranked again.

INSERT INTO unsettled
SELECT DISTINCT task, metric, num_fewshot, max_new_tokens, template, rows_sha256 FROM scores;
