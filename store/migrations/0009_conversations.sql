-- Conversations turn by turn, and the system prompt of a score.

ALTER TABLE scores ADD COLUMN system_prompt VARCHAR;
COMMENT ON COLUMN scores.system_prompt IS 'System prompt in front of every question; empty for none at all; NULL where it is left to the chat template';

CREATE TABLE score_turns (
    score_id VARCHAR NOT NULL,
    turn INTEGER NOT NULL,
    value DOUBLE NOT NULL CHECK (isfinite(value)),
    prompt_tokens DOUBLE NOT NULL CHECK (isfinite(prompt_tokens)),
    computed_tokens DOUBLE NOT NULL CHECK (isfinite(computed_tokens)),
    new_tokens DOUBLE NOT NULL CHECK (isfinite(new_tokens)),
    seconds DOUBLE NOT NULL CHECK (isfinite(seconds)),
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE score_turns IS 'A score of conversations on each of their turns';
COMMENT ON COLUMN score_turns.score_id IS 'Benchmark id of the score';
COMMENT ON COLUMN score_turns.turn IS 'Number of the turn, from 1';
COMMENT ON COLUMN score_turns.value IS 'The score on it, in the metric''s unit';
COMMENT ON COLUMN score_turns.prompt_tokens IS 'Mean length of the prompt with the whole history, in tokens';
COMMENT ON COLUMN score_turns.computed_tokens IS 'Mean number of its tokens that were computed at this turn; the others were in a cache';
COMMENT ON COLUMN score_turns.new_tokens IS 'Mean length of the answer, in tokens';
COMMENT ON COLUMN score_turns.seconds IS 'Mean time of the turn: of a batch, divided by its number of conversations, in seconds';
COMMENT ON COLUMN score_turns.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';
