"""A function of the pipelines called in this process, since another takes seconds to import."""

import json
from collections.abc import Callable
from typing import Any

from meteora.untrusted.findings import brief
from pipelines.processes.child import ChildError


def call_here(
    function: Callable[..., Any],
    *arguments: object,
    seconds: float,
    describe: Callable[[Exception], Any] = brief,
) -> Any:
    """As `isolated.call`, without its limits."""
    assert seconds > 0
    try:
        return json.loads(json.dumps(function(*json.loads(json.dumps(arguments)))))
    except Exception as error:
        raise ChildError(json.loads(json.dumps(describe(error)))) from error
