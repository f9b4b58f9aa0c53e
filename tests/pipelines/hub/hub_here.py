"""The Hub as it is asked from the tests' own process."""

from __future__ import annotations

from typing import Any

from huggingface_hub import HfApi

from pipelines.hub import worker
from pipelines.hub.client import Hub
from pipelines.hub.errors import hub_error


class HubHere(Hub):
    """The worker's own operations without a process for each, which only costs time here."""

    def ask(self, operation: str, what: str, repo_id: str = "", **arguments: Any) -> Any:
        api = HfApi(endpoint=self.endpoint, token=self.token or False)
        try:
            return worker.OPERATIONS[operation](api, repo_id=repo_id, **arguments)
        except Exception as error:
            raise hub_error(what, worker.describe(error), self.endpoint) from error
