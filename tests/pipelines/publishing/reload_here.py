"""What is published is loaded from the Hub in the tests' own process."""

from collections.abc import Mapping
from typing import Any, Self

import pytest
from huggingface_hub import constants

from meteora.artifacts import MeteoraError
from pipelines.processes.child import ChildError
from pipelines.publishing import publish, reload_worker


class ReloadHere:
    """In place of the worker's process, in which to load the model libraries takes seconds."""

    def __init__(self, module: str, *, quiet: bool, environment: Mapping[str, str]) -> None:
        assert (module, quiet) == (publish.RELOAD_WORKER, True)
        self._environment = environment

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def ask(self, request: dict[str, Any], *, deadline_seconds: float) -> dict[str, Any]:
        assert deadline_seconds > 0
        with pytest.MonkeyPatch.context() as patch:
            endpoint = self._environment["HF_ENDPOINT"]
            file = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            patch.setattr(constants, "ENDPOINT", endpoint)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", file)
            patch.setenv("HF_TOKEN", self._environment["HF_TOKEN"])
            try:
                return reload_worker.compare(**request)
            except (MeteoraError, OSError, ValueError, RuntimeError) as error:
                raise ChildError(str(error)) from error
