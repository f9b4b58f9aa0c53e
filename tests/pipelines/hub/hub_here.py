"""The Hub as it is asked from the tests' own process."""

import json
import resource
from collections.abc import Mapping
from typing import Any, Self

from huggingface_hub import HfApi

from pipelines.hub import client, worker
from pipelines.hub.client import Hub
from pipelines.hub.errors import hub_error
from pipelines.processes.child import ChildError


class HubHere(Hub):
    """The worker's own operations without a process for each, which only costs time here."""

    def ask(self, operation: str, repo_id: str, what: str = "", /, **arguments: Any) -> Any:
        api = HfApi(endpoint=self.endpoint, token=self.token or False)
        try:
            return worker.OPERATIONS[operation](api, repo_id=repo_id, **arguments)
        except Exception as error:
            raise hub_error(what or repo_id, worker.describe(error), self.endpoint) from error


class WorkerHere:
    """The same in place of the worker's process: what asks is whole, but for deadlines."""

    def __init__(self, module: str, *, quiet: bool, environment: Mapping[str, str]) -> None:
        assert (module, quiet) == (client.WORKER, True)
        assert environment

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def ask(self, request: dict[str, Any], *, deadline_seconds: float) -> Any:
        assert deadline_seconds > 0
        request = json.loads(json.dumps(request))
        api = HfApi(endpoint=request.pop("endpoint"), token=request.pop("token"))
        operation = worker.OPERATIONS[request.pop("operation")]
        largest_file = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            return json.loads(json.dumps(operation(api, **request)))
        except Exception as error:
            raise ChildError(worker.describe(error)) from error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, largest_file)
