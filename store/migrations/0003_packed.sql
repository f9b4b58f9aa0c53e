-- Records can be packed, many in one file; the index remembers which files it has read.

CREATE TABLE read_files (name VARCHAR NOT NULL);
COMMENT ON TABLE read_files IS 'Files of records that have been read into this index';
COMMENT ON COLUMN read_files.name IS 'SHA-256 of a record that lies in a file of its own, or the name of a segment';
INSERT INTO read_files SELECT sha256 FROM records;

-- without its primary key, which takes three quarters of the space; `offer` asks for each record once
CREATE TABLE records_of_old AS FROM records;
DROP TABLE records;
CREATE TABLE records (
    sha256 VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    version INTEGER NOT NULL,
    recorded_at TIMESTAMP NOT NULL,
    run_id VARCHAR NOT NULL,
    subject VARCHAR NOT NULL
);
INSERT INTO records FROM records_of_old;
DROP TABLE records_of_old;
COMMENT ON TABLE records IS 'Every record that has been read into this index';
COMMENT ON COLUMN records.sha256 IS 'SHA-256 of the record''s bytes, 64 hex digits';
COMMENT ON COLUMN records.kind IS 'artifact, score, routing, adapter, publication, run-started, run-ended or failure';
COMMENT ON COLUMN records.version IS 'Version of the shape of its body';
COMMENT ON COLUMN records.recorded_at IS 'When it was recorded, UTC';
COMMENT ON COLUMN records.run_id IS 'The run that recorded it';
COMMENT ON COLUMN records.subject IS 'What it is about: an artifact id, a run id, an adapter at its revision';

COMMENT ON COLUMN run_ends.outcome IS 'ok, failed, refused, stopped, killed, skipped_late or skipped_overlap';

-- the closure of parents, kept as it grows, so that nobody has to walk it
CREATE TABLE ancestors (descendant_id VARCHAR NOT NULL, ancestor_id VARCHAR NOT NULL, depth INTEGER NOT NULL);
COMMENT ON TABLE ancestors IS 'What each artifact was made from, directly or through others';
COMMENT ON COLUMN ancestors.descendant_id IS 'Artifact id of what was made';
COMMENT ON COLUMN ancestors.ancestor_id IS 'Artifact id of what went into it';
COMMENT ON COLUMN ancestors.depth IS 'Number of steps between the two, the fewest';
INSERT INTO ancestors
WITH RECURSIVE steps(descendant_id, ancestor_id, depth) AS (
    SELECT child_id, parent_id, 1 FROM parents
    UNION
    SELECT steps.descendant_id, parents.parent_id, steps.depth + 1
    FROM steps JOIN parents ON parents.child_id = steps.ancestor_id
    WHERE steps.depth < 32
)
SELECT descendant_id, ancestor_id, min(depth) FROM steps GROUP BY ALL;
