-- How surely routers decide, and how soon they follow a change of task.

CREATE TABLE routing_details (
    router_id VARCHAR NOT NULL,
    module VARCHAR NOT NULL,
    entropy_bits DOUBLE NOT NULL CHECK (isfinite(entropy_bits)),
    weight DOUBLE NOT NULL CHECK (isfinite(weight)),
    agreement DOUBLE NOT NULL CHECK (isfinite(agreement)),
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE routing_details IS 'How one routed module decides, over the tokens of all experts'' own rows';
COMMENT ON COLUMN routing_details.router_id IS 'Artifact id of the router';
COMMENT ON COLUMN routing_details.module IS 'Path of the linear layer in the base model';
COMMENT ON COLUMN routing_details.entropy_bits IS 'Mean entropy of the softmax over all experts, in bits; 0 where every choice is sure';
COMMENT ON COLUMN routing_details.weight IS 'Mean weight of the expert that was chosen first, 0 to 1';
COMMENT ON COLUMN routing_details.agreement IS 'Share of tokens that it sends where most modules send them, 0 to 1';
COMMENT ON COLUMN routing_details.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';

CREATE TABLE routing_switches (
    router_id VARCHAR NOT NULL,
    expert VARCHAR NOT NULL,
    in_answer BOOLEAN NOT NULL,
    delay_tokens BIGINT,
    num_switches BIGINT NOT NULL,
    record_sha256 VARCHAR NOT NULL
);
COMMENT ON TABLE routing_switches IS 'How soon routing follows where one task''s text ends and another''s begins';
COMMENT ON COLUMN routing_switches.router_id IS 'Artifact id of the router';
COMMENT ON COLUMN routing_switches.expert IS 'Name of the expert whose text begins';
COMMENT ON COLUMN routing_switches.in_answer IS 'Whether it is an answer''s text, and not a question''s';
COMMENT ON COLUMN routing_switches.delay_tokens IS 'Number of tokens that pass before one is sent to the expert; NULL where the text ends first';
COMMENT ON COLUMN routing_switches.num_switches IS 'Number of times that this was seen';
COMMENT ON COLUMN routing_switches.record_sha256 IS 'SHA-256 of the record behind this row, 64 hex digits';
