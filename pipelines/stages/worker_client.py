"""The run's side of the worker process, which does the long work.

One process serves all stages of a run, so the model libraries are loaded once. A stage takes and
returns artifacts and plans, never a tensor: large results are in the store.
"""

import os
from collections.abc import Callable
from typing import Any

from meteora.artifacts import MeteoraError
from pipelines.processes.child import ChildDiedError, ChildProcess, ChildTimeoutError
from pipelines.workspace.context import RunContext
from pipelines.workspace.environment import SETTINGS


class StageError(MeteoraError):
    """A stage ran past its deadline, or its process died."""


class StageProcess(ChildProcess):
    """A process that waits for stages to run.

    Args:
        on_progress: Called every few seconds with the name of the work, its steps done, and all.
        on_message: Called with each line that the process printed.
    """

    def __init__(
        self,
        work: RunContext,
        *,
        on_progress: Callable[[str, int, int], None],
        on_message: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self._listeners = {"progress": on_progress, "message": on_message}
        # a worker of a cluster was started without these settings
        settings = SETTINGS | dict(os.environ)
        super().__init__("pipelines.stages.worker", pickled=True, environment=settings)
        self.send((work.home, work.recipe, work.path, work.run_id, work.recipe_sha256))

    def call(self, stage: str, *arguments: object, deadline_seconds: float) -> Any:  # noqa: ANN401
        """Run a stage, and return what it returns.

        Raises:
            StageError: It took longer than its deadline, or its process died.
            Exception: The error of the stage itself.
        """
        try:
            return self.ask(
                (stage, arguments), deadline_seconds=deadline_seconds, listeners=self._listeners
            )
        except ChildDiedError as error:
            raise StageError(f"{stage}: {error}; run again to go on") from None
        except ChildTimeoutError as error:
            raise StageError(
                f"{stage}: {error}; raise the deadline in the recipe (`deadlines:`), or ask for"
                " less; what was finished is kept"
            ) from None
