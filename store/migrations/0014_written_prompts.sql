-- Experts may write a pool's prompts themselves.

COMMENT ON COLUMN pools.prompts_sha256 IS 'SHA-256 of the prompts, 64 hex digits; empty where experts wrote them';
COMMENT ON COLUMN pool_shares.score IS 'How much larger the expert''s updates are there than elsewhere, in standard deviations; for nobody''s that of the expert with the most. Where the expert wrote them: how much likelier they are for it than for the base, in nats a token';
COMMENT ON COLUMN pool_shares.lead IS 'How far the score is above the next expert''s. Where the expert wrote them: how much likelier they are in the user''s place than its answers there, in nats a token';
