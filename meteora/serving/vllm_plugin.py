"""What vLLM calls in each of its processes, by the entry point group `vllm.general_plugins`.

It makes `quant_method: meteora` known, the key by which the config of a served folder asks for
experts. vLLM calls it whatever it serves, so it neither fails nor imports much.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from meteora.serving.served_folder import (
    METHOD,
    UnservableError,
    problem_with_version,
    vllm_version,
)


def register() -> None:
    """Make `quant_method: meteora` known to vLLM; in an unknown version, as what is refused."""
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
    """A config that cannot be made, for versions whose internals are not known."""
    from vllm.model_executor.layers.quantization.base_config import (  # noqa: PLC0415
        QuantizationConfig,
    )

    def refuse(_config: dict[str, Any]) -> None:
        raise UnservableError(problem)

    return type("RefusedConfig", (QuantizationConfig,), {"from_config": staticmethod(refuse)})
