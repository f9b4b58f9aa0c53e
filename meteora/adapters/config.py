"""Read the `adapter_config.json` of PEFT or MLX-LM. It is a claim; the tensors are the truth.

PEFT itself does not validate untrusted configs: it runs their regular expressions, accepts `NaN` as
an alpha, and only warns of keys that it does not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from meteora.untrusted.config_fields import (
    ALL_LINEAR,
    MAX_ALPHA,
    MIN_ALPHA,
    Field,
    base_model,
    fields_of,
    is_active,
    number,
    refuse_unknown,
    unlike,
)
from meteora.untrusted.findings import Findings, listed, quoted, shortened

OnExtras = Literal["refuse", "strip"]
"""What to do with whole modules that were saved beside the LoRA."""


@dataclass(frozen=True)
class Claim:
    """The part of a config that decides what the tensors mean."""

    format: Literal["peft", "mlx"]
    base_model: str
    base_revision: str = ""
    task_type: str = ""
    r: int = 0
    """The rank of modules that no pattern names; 0 if it is refused."""
    lora_alpha: float = 0.0
    scale: float = 0.0
    """MLX-LM's factor before B·A; PEFT has `lora_alpha` instead."""
    use_rslora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    """(pattern, rank), in the order of the file: the first pattern that matches counts."""
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    target_modules: tuple[str, ...] | str = ()
    """Names, or a pattern, or `all-linear`; empty where PEFT's defaults for the base hold."""
    exclude_modules: tuple[str, ...] | str = ()
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    """Whether a LoRA of the embedding is one of the head, too, which no list of targets names."""
    layers_to_transform: tuple[int, ...] = ()
    bias: str = "none"


VARIANTS = {
    "use_dora": ("dora", "DoRA rescales the base's own weights"),
    "lora_bias": ("lora_bias", "its B has a bias"),
    "target_parameters": ("target_parameters", "it targets bare parameters, as of fused experts"),
    "trainable_token_indices": ("trainable_tokens", "it changes rows of the embedding"),
    "layer_replication": ("layer_replication", "it repeats layers of the base"),
    "alora_invocation_tokens": ("alora", "it is active only after its invocation tokens (aLoRA)"),
    "use_qalora": ("qalora", "QALoRA pools the inputs of A"),
    "use_bdlora": ("bdlora", "BD-LoRA has block-diagonal factors"),
    "kasa_config": ("kasa", "KaSA changes the base's weights"),
    "velora_config": ("velora", "VeLoRA is not plain LoRA"),
    "monteclora_config": ("monteclora", "MonteCLoRA samples its factors"),
    "arrow_config": ("arrow", "it is an Arrow router and holds no LoRA of its own"),
    "megatron_config": ("megatron", "it is for layers of Megatron"),
}
"""Fields of PEFT's `LoraConfig` that, when active, mean other mathematics than W + s·B·A."""

# These initialise A and B with factors of W and keep only the rest of W in the base, so B·A belongs
# to a base that was not published. Adapters that PEFT converted on saving have `true` and pass.
INIT_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
INIT_LEAVES_BASE = ("gaussian", "eva", "orthogonal", "mica")

UNDERSTOOD = {
    "base_model_name_or_path", "revision", "peft_type", "task_type", "r", "lora_alpha",
    "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save",
    "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "ensure_weight_tying", "auto_mapping",
}  # fmt: skip
WITHOUT_EFFECT = {
    "inference_mode", "lora_dropout", "peft_version", "megatron_core", "qalora_group_size",
    "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "merge_weights",
}  # fmt: skip
"""Keys about training and loading, and keys that matter only together with a refused one."""

MLX_PARAMETERS = {"rank", "scale", "alpha", "dropout", "keys"}

TASK_TYPES = (
    "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip
HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
BIASES = ("none", "all", "lora_only")
CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def peft_claim(config: Mapping[str, Any], extras: OnExtras, found: Findings) -> Claim | None:
    """Read a PEFT config; return None if it is not LoRA, so that the other fields mean nothing."""
    kind = config["peft_type"]
    if kind != "LORA":
        found.refuse("peft_type", f"peft_type is {quoted(kind)}; only LORA can be an expert here")
        return None
    _refuse_variants(config, found)
    _unknown_keys(config, UNDERSTOOD | WITHOUT_EFFECT | set(VARIANTS), found)
    layers, field = _layers(config, found), fields_of(config, found)
    claim = Claim(
        "peft",
        base_model=base_model(config.get("base_model_name_or_path"), found),
        base_revision=field("revision").text(),
        task_type=_task(config, extras, found),
        r=field("r", 8).rank(),
        lora_alpha=field("lora_alpha", 8).alpha(),
        use_rslora=field("use_rslora").flag(),
        rank_pattern=field("rank_pattern").patterns(Field.rank),
        alpha_pattern=field("alpha_pattern").patterns(Field.alpha),
        target_modules=field("target_modules").targets(),
        exclude_modules=field("exclude_modules").targets(),
        modules_to_save=field("modules_to_save").names(),
        ensure_weight_tying=config.get("ensure_weight_tying") is True,
        layers_to_transform=layers,
        bias=field("bias", "none").one_of(BIASES),
    )
    _check_auto_mapping(config.get("auto_mapping"), found)
    return claim


def mlx_claim(config: Mapping[str, Any], found: Findings) -> Claim:
    """Read a config of MLX-LM: y += scale · (x A) B with A [IN, r] and B [r, OUT].

    Up to 0.14.1 (May 2024) MLX-LM multiplied `scale` by alpha / rank. From 0.14.2 on it ignores
    alpha, but wrote one until 2025. Configs have `num_layers` since 0.19, and `lora_layers` before;
    nothing else in them tells the version.
    """
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind != "lora":
        found.refuse(
            "mlx_fine_tune_type",
            f"its fine_tune_type is {quoted(kind)}; of MLX-LM's only lora can be converted",
        )
    parameters = config["lora_parameters"]
    refuse_unknown(parameters, "lora_parameters", MLX_PARAMETERS, found)
    field = fields_of(parameters, found)
    r = field("rank", where="lora_parameters.rank").rank()
    scale_written = parameters.get("scale")
    scale = number(scale_written)
    if scale is None or not MIN_ALPHA <= scale <= MAX_ALPHA:
        found.refuse(
            "mlx_scale",
            f"lora_parameters.scale is {quoted(scale_written)}; MLX-LM needs a number from"
            f" {MIN_ALPHA} to 10^6 there{unlike(scale_written)}, and no other field stands in for"
            " it",
        )
        scale = 1.0
    elif parameters.get("alpha") is not None and "lora_layers" in config and r:
        earlier = scale * field("alpha", where="lora_parameters.alpha").alpha() / r
        if earlier != scale:
            found.refuse(
                "mlx_alpha",
                f"it was scaled by {earlier:g} if MLX-LM 0.14.1 or earlier wrote it (scale · alpha"
                f" / rank) and by {scale:g} if 0.14.2 to 0.18 did (scale), and nothing in it tells"
                " which; take alpha out of its lora_parameters and let scale be the right one",
            )
    found.warn("mlx_converted", "it is an MLX-LM adapter; its factors are read transposed")
    keys = parameters.get("keys")
    return Claim(
        "mlx",
        base_model=base_model(config.get("model") or config.get("base_model_name_or_path"), found),
        task_type="CAUSAL_LM",
        r=r,
        scale=scale,
        target_modules=field("keys").targets() if isinstance(keys, list) else (),
    )


def _refuse_variants(config: Mapping[str, Any], found: Findings) -> None:
    for key, (code, why) in VARIANTS.items():
        if is_active(config.get(key)):
            found.refuse(code, f"{key} is set: {why}; only plain LoRA can be an expert here")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() == "gaussian":
        init = init.lower()  # PEFT ignores the case of this value alone
    if isinstance(init, str) and init.lower().startswith(INIT_CHANGES_BASE):
        found.refuse(
            "init_changes_base",
            f"init_lora_weights is {quoted(init)}, which changes the base's weights; save it"
            " again with path_initial_model_for_weight_conversion, which converts it to plain LoRA",
        )
    elif init is not None and type(init) is not bool and init not in INIT_LEAVES_BASE:
        found.refuse(
            "init_unknown",
            f"init_lora_weights is {quoted(init)}, which is not known here; it may have"
            " changed the base's weights",
        )
    if is_active(config.get("enable_lora")):
        found.refuse("enable_lora", "enable_lora is set: a merged layout of PEFT 0.2 and before")


def _unknown_keys(config: Mapping[str, Any], known: set[str], found: Findings) -> None:
    unknown = sorted(key for key in config if key not in known and key != "enable_lora")
    active, idle = [], []
    for key in unknown:
        (active if is_active(config[key]) else idle).append(key)
    if active:
        found.refuse(
            "unknown_key",
            f"{listed(active)} is set and not known here; it may change what the tensors mean",
        )
    if idle:
        found.warn("unknown_key", f"{listed(idle)} is not known here and not set; it is ignored")


def _layers(config: Mapping[str, Any], found: Findings) -> tuple[int, ...]:
    """Read the layer numbers of `layers_to_transform`; refuse what PEFT refuses to load."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    targets = config.get("target_modules")
    if (
        isinstance(targets, str)
        and targets.lower() != ALL_LINEAR
        and (layers is not None or pattern)
    ):
        found.refuse("layers", "layers_to_transform needs target_modules to be a list of names")
    if pattern and layers is None:
        found.refuse("layers", "layers_pattern is set without layers_to_transform")
    every = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(layer) is int for layer in every):
        found.refuse("layers", f"layers_to_transform is {quoted(layers)}, not layer numbers")
    return tuple(sorted({layer for layer in every if type(layer) is int}))


def _task(config: Mapping[str, Any], extras: OnExtras, found: Findings) -> str:
    task = config.get("task_type")
    if task is None:
        found.warn("task_type", "task_type is empty; it is taken for a language model's adapter")
        return ""
    if task not in TASK_TYPES:
        found.refuse("task_type", f"task_type is {quoted(task)}; PEFT knows no such task")
        return ""
    if task in HEAD_TASKS and extras == "refuse":
        found.refuse(
            "task_type",
            f"task_type is {task}: it answers through a head that a language model lacks",
        )
    elif task != "CAUSAL_LM":
        found.warn("task_type", f"task_type is {task}, not CAUSAL_LM; the base must be a decoder")
    return task


def _check_auto_mapping(mapping: object, found: Findings) -> None:
    """Check the name of the class that the adapter was trained on; the class is never imported."""
    if not is_active(mapping):
        return
    if not isinstance(mapping, dict):
        found.refuse("auto_mapping", "auto_mapping is not a table of two names")
        return
    class_name = shortened(mapping.get("base_model_class", ""))
    if shortened(mapping.get("parent_library", "")).startswith("diffusers."):
        found.refuse("diffusers", f"it is for {class_name}, an image model of diffusers")
    elif class_name in {"PeftModel", "PeftMixedModel"}:
        pass  # trained on a model that had an adapter already; its keys tell, and get a warning
    elif class_name.startswith("Whisper") or not class_name.endswith(CAUSAL_CLASSES):
        found.refuse("base_class", f"it is for {class_name!r}, not a language model")
