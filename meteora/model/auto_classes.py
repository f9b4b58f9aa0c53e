"""Load fused checkpoints with the auto classes of transformers.

    AutoModelForCausalLM.from_pretrained("org/name")     the base's own class, with routed layers
    AutoTokenizer.from_pretrained("org/name")            the base's own tokenizer
    pipeline("text-generation", model="org/name")

The checkpoint's `config.json` names only the model type; everything else is in its manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig

from meteora.artifacts import MeteoraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_TYPE = "meteora"
DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
"""Arguments about downloads, used for the checkpoint and for its base."""
OURS = (
    "base_folder", "expert_cache_bytes", "dtype", "quantization_config",
    "device_map", "max_memory", "offload_folder",
)  # fmt: skip
"""Arguments that `meteora.load` has too."""
IDLE = {
    "adapter_kwargs", "code_revision", "low_cpu_mem_usage", "trust_remote_code", "use_fast",
    "use_safetensors", "weights_only",
}  # fmt: skip
"""Arguments that change nothing here: no code and no pickle is ever loaded from a repository."""

OF_FORWARD = ("output_attentions", "output_hidden_states", "return_dict")
"""Arguments that transformers has put into the configuration: what a call of the model returns."""


class UnsupportedArgumentError(MeteoraError, TypeError):
    """A fused model cannot be loaded with an argument of `from_pretrained`."""


class MeteoraConfig(PreTrainedConfig):
    """Marks a folder as a fused checkpoint; a loaded model has the configuration of its base."""

    model_type = MODEL_TYPE


class MeteoraForCausalLM:
    """Loads fused models; a loaded model is of the base's own class."""

    config_class = MeteoraConfig

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        config: MeteoraConfig,
        revision: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> PreTrainedModel:
        """Load a model as `meteora.load` does, with the arguments of transformers.

        Raises:
            UnsupportedArgumentError: an argument asks for something that is not supported.
        """
        from meteora.model.fused import load  # noqa: PLC0415  (torch: only loading needs it)

        _refuse_subfolder(name, options.pop("subfolder", None))
        download = {key: options.pop(key) for key in DOWNLOAD if key in options}
        ours = {key: options.pop(key) for key in OURS if key in options}
        if (legacy := options.pop("torch_dtype", None)) is not None:
            ours.setdefault("dtype", legacy)
        attention = options.pop("attn_implementation", config._attn_implementation)
        unknown = sorted(
            key
            for key, value in options.items()
            if not key.startswith("_") and key not in IDLE and value is not None
        )
        if unknown:
            raise UnsupportedArgumentError(
                f"{name}: a fused model is not loaded with {', '.join(unknown)}; load the base with"
                " it and insert the experts with meteora.model, or leave it out"
            )
        model, _ = load(name, revision=revision, download=download, **ours)
        if attention is not None:
            model.set_attn_implementation(attention)
        usual = MeteoraConfig()
        for key in OF_FORWARD:
            if (value := getattr(config, key)) != getattr(usual, key):
                setattr(model.config, key, value)
        return model


class MeteoraTokenizer:
    """Loads the tokenizer of a checkpoint's base."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        base_folder: str | Path | None = None,
        **options: Any,  # noqa: ANN401
    ) -> PreTrainedTokenizerBase:
        """Load it, with the arguments of transformers; no tensors are read.

        Raises:
            UnsupportedArgumentError: a subfolder is named.
        """
        from meteora.base.loading import load_tokenizer  # noqa: PLC0415  (torch)
        from meteora.checkpoint import manifest, resolve  # noqa: PLC0415

        _refuse_subfolder(name, options.pop("subfolder", None))
        download = {key: options.pop(key) for key in DOWNLOAD if key in options}
        folder = resolve.find_checkpoint(name, revision, download=download, whole=False)
        found = manifest.read_manifest(folder)
        of_base = resolve.base_download(name, found, download)
        source = resolve.base_files(found, base_folder, of_base, weights=False)
        settings = {
            key: value
            for key, value in options.items()
            if not key.startswith("_") and key not in {*IDLE, *OURS}
        }
        return load_tokenizer(source, options=settings)


def _refuse_subfolder(name: str | Path, subfolder: str | None) -> None:
    if subfolder:  # the folder above it may be another checkpoint
        raise UnsupportedArgumentError(
            f"{name}: a fused model is not loaded from a subfolder, such as {subfolder!r}; give its"
            " own folder"
        )


CLASSES = {
    "AutoConfig": (MODEL_TYPE, MeteoraConfig),
    "AutoModelForCausalLM": (MeteoraConfig, MeteoraForCausalLM),
    "AutoTokenizer": (MeteoraConfig, MeteoraTokenizer),
}
"""The arguments of `register` for each auto class."""
