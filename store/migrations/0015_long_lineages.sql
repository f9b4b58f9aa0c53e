-- What was made by growing another router, more than 32 times over, has all its ancestors.

DELETE FROM ancestors;

INSERT INTO ancestors
WITH RECURSIVE steps(descendant_id, ancestor_id, depth) USING KEY (descendant_id, ancestor_id) AS (
    SELECT child_id, parent_id, 1 FROM parents
    UNION
    SELECT steps.descendant_id, parents.parent_id, steps.depth + 1
    FROM steps JOIN parents ON parents.child_id = steps.ancestor_id
    ANTI JOIN recurring.steps AS nearer
           ON nearer.descendant_id = steps.descendant_id AND nearer.ancestor_id = parents.parent_id
)
FROM steps;
