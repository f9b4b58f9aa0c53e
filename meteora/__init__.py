"""Many LoRA adapters in one base model, as a mixture of experts (MeteoRA, arXiv 2405.13053).

    model, tokenizer = meteora.load("folder-or-hub-id")
    print(meteora.generate(model, tokenizer, "Convert this date to ISO format: March 3, 2021."))
    with meteora.force_expert(model, "iso_dates"):
        ...

`__all__` is the whole public surface. Its functions are imported when they are first used, so that
`import meteora` and `import meteora.artifacts` stay light.

After the import, transformers' own `AutoModelForCausalLM.from_pretrained` and `pipeline` take fused
checkpoints too, as folders or Hub ids; no remote code is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from meteora.model import registration

if TYPE_CHECKING:
    from meteora.model.fused import (
        expert_cache,
        expert_names,
        force_expert,
        load,
        without_experts,
    )
    from meteora.model.generate import generate
    from meteora.model.trace import trace

__all__ = [
    "__version__",
    "expert_cache",
    "expert_names",
    "force_expert",
    "generate",
    "load",
    "trace",
    "without_experts",
]
__version__ = "0.2.0"

registration.install()


def __getattr__(name: str) -> object:
    """Import a public function on first use (PEP 562)."""
    if name in __all__:
        module = name if name in {"generate", "trace"} else "fused"
        return getattr(import_module(f"meteora.model.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion in a shell."""
    return sorted(__all__)
