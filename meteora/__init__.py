"""Many LoRA adapters in one base model, as a mixture of experts (MeteoRA, arXiv 2405.13053).

    model, tokenizer = meteora.load("folder-or-hub-id")
    with meteora.force_expert(model, "name"):
        ...

Both names are loaded when they are first used, so that `import meteora.artifacts` stays light.
Importing the package also makes transformers' own `AutoModelForCausalLM.from_pretrained` and
`pipeline` take such folders and Hub ids; no remote code is ever needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meteora.model import registration

if TYPE_CHECKING:
    from meteora.model.fused import force_expert, load

__all__ = ["__version__", "force_expert", "load"]
__version__ = "0.1.0"

registration.install()


def __getattr__(name: str) -> object:
    """Import `load` and `force_expert` on first use (PEP 562)."""
    if name in {"force_expert", "load"}:
        from meteora.model import fused  # noqa: PLC0415  (the point of this function)

        return getattr(fused, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
