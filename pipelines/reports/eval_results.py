"""Scores for the Hub's leaderboards, which it reads from `.eval_results` in a model's repository.

An entry names a dataset that the Hub keeps as a benchmark, and a task of its `eval.yaml`. Only who
writes the recipe can say that a task is one, asked as that benchmark asks it; so it is said there,
task by task (`leaderboard:`), and nothing is guessed from where rows come from. There is no field
for how many rows were asked or for an interval: both stand in the notes. Every other score is in
the card's `model-index`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from pipelines.evaluation.measurements import FUSED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipelines.recipe.benchmark import TaskSection
    from pipelines.reports.summary import Summary

NAME = ".eval_results/meteora.yaml"


def write_eval_results(tasks: Sequence[TaskSection], summary: Summary) -> str:
    """The file's text; empty where no task is said to be on a leaderboard.

    Shares of rows that were right become percent, as the boards show them.
    """
    entries = []
    for task in tasks:
        score = summary.scores.get(task.called, {}).get(FUSED)
        if not task.leaderboard or score is None:
            continue
        owner, dataset, task_id = task.leaderboard.split("/")
        unit = 100 if score.interval == "wilson" else 1
        entries.append(
            EvalResultEntry(
                dataset_id=f"{owner}/{dataset}",
                task_id=task_id,
                value=round(unit * score.value, 4),
                notes=f"{score.spec.metric}, zero-shot, greedy, {score.harness}; of"
                f" {score.num_samples} rows, 95 % interval {unit * score.low:.4g} to"
                f" {unit * score.high:.4g}",
            )
        )
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else ""
