"""The plugin that vLLM calls in each of its processes (entry point group `vllm.general_plugins`).

It registers `quant_method: meteora`, which the config of a served folder has. vLLM calls it for
every model, so it neither fails nor imports much.
"""

from contextlib import suppress
from typing import Any

from meteora.serving.vllm_version import (
    METHOD,
    UnservableError,
    problem_with_version,
    vllm_version,
)


def register() -> None:
    """Register `quant_method: meteora`; with another version of vLLM, a config that is refused."""
    problem = problem_with_version(vllm_version())
    with suppress(*[ImportError] if problem else []):
        from vllm.model_executor.layers.quantization import (  # noqa: PLC0415  (optional, and slow to import)
            register_quantization_config,
        )

        register_quantization_config(METHOD)(_refusing(problem) if problem else _config())


def _config() -> type:
    from meteora.serving.vllm_linear import MeteoraConfig  # noqa: PLC0415

    return MeteoraConfig


def _refusing(problem: str) -> type:
    """A config class that raises `UnservableError`, for versions with unknown internals."""
    from vllm.model_executor.layers.quantization.base_config import (  # noqa: PLC0415
        QuantizationConfig,
    )

    def refuse(_config: dict[str, Any]) -> None:
        raise UnservableError(problem)

    return type("RefusedConfig", (QuantizationConfig,), {"from_config": staticmethod(refuse)})
