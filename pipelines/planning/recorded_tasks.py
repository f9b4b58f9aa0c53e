"""Tasks of earlier benchmarks, made again from the recorded answers; no file of rows is needed."""

import json
from collections.abc import Mapping, Sequence

from meteora.artifacts import ArtifactId, Score
from pipelines.data.rows import Row
from pipelines.evaluation.tasks import Task
from pipelines.scoring.outputs import read_outputs
from store.ledger import Ledger

OWN_TASK = """
SELECT id FROM scores
WHERE base_id = '{base_id}' AND task = '{name}' AND (
    subject_id = '{adapter_id}' OR subject_id IN (
        SELECT routers.id FROM routers JOIN experts USING (fused_id)
        WHERE adapter_id = '{adapter_id}'
    )
)
ORDER BY subject_id = '{router_id}' DESC, (
    SELECT depth FROM ancestors WHERE descendant_id = '{router_id}' AND ancestor_id = subject_id
    AND starts_with(ancestor_id, 'router:')
) NULLS LAST, num_samples DESC, recorded_at DESC, id LIMIT 100
"""
"""Scores on the task with an expert's name: of this model first, then of those that it has grown
from, so that both are asked the same, then of its adapter and of other models with that adapter.
More rows come first, so a quick trial does not decide."""


def recorded_tasks(
    ledger: Ledger, base_id: ArtifactId, experts: Mapping[str, ArtifactId], router_id: str = ""
) -> dict[str, Task]:
    """The own task of each expert, of the score that `OWN_TASK` puts first.

    Tasks without a score are left out. Of equal scores the last one counts.

    Args:
        experts: The adapter of each expert, by name; its task has the same name.
    """
    tasks = {}
    for name, adapter_id in experts.items():
        literal = name.replace("'", "''")
        query = OWN_TASK.format(
            base_id=base_id, adapter_id=adapter_id, name=literal, router_id=router_id
        )
        if task := _task(ledger, ledger.scores(query)):
            tasks[name] = task
    return tasks


def _task(ledger: Ledger, scores: Sequence[Score]) -> Task | None:
    """The task of the first score whose rows can be read, with all metrics of these rows."""
    for score in scores:
        spec = score.spec
        if score.outputs_sha256 not in ledger.blobs:
            continue
        outputs = read_outputs(ledger.blobs.path_of(score.outputs_sha256), ["asked"])
        if "asked" not in outputs[0]:  # a task of lm-eval's own, under this name
            continue
        alike = [one.spec for one in reversed(scores) if one.spec.rows_sha256 == spec.rows_sha256]
        task = Task(
            spec.task,
            tuple(dict.fromkeys(one.metric for one in alike)),
            spec.template,
            spec.max_new_tokens,
            rows=[Row.from_dict(json.loads(row["asked"])) for row in outputs],
            expert=spec.task,
            system_prompt=spec.system_prompt,
        )
        if task.rows_sha256 == spec.rows_sha256:
            return task
    return None
