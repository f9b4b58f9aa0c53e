"""Bases, adapters and what is wrong with them, stacks of adapters, merges, and pools of prompts."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple, Self

from meteora.artifacts.identity import COMMIT, SHA256, ArtifactId, Noun, Spec


@dataclass(frozen=True)
class Fingerprint(Noun):
    """The facts that two models must share to count as the same base."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    vocabulary_sha256: str
    """Of the canonical JSON of the tokenizer's {token: id}."""

    def differences(self, other: Self) -> list[str]:
        """The differing fields, as "hidden_size 576, not 960"; empty for the same base."""
        return [
            f"{f.name} {_brief(getattr(self, f.name))}, not {_brief(getattr(other, f.name))}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]


def _brief(value: object) -> str:
    return str(value)[:16]


QUANTISED = ("", "4bit", "8bit")
"""Ways to quantise a base's linear layers when it is loaded; empty: not at all."""


@dataclass(frozen=True)
class BaseSpec(Spec):
    """A frozen base model, at one revision."""

    kind: ClassVar[str] = "base"

    base_model: str
    """A Hub id, `gguf:<package>/<file>`, or `path:<folder name>`."""
    base_revision: str
    """The commit; for a file or a folder `sha256:` and the hash of its weights."""
    quantise: str = ""
    """One of `QUANTISED`."""

    @property
    def stored(self) -> Self:
        """The base as its files hold it, without quantisation."""
        return replace(self, quantise="")

    @property
    def parents(self) -> tuple[ArtifactId, ...]:
        return (self.stored.id,) if self.quantise else ()


@dataclass(frozen=True)
class LinearSize(Noun):
    """One linear layer of a base, which an adapter's module has to fit."""

    path: str
    in_features: int
    out_features: int
    norm: float = 0.0
    """Frobenius norm of its weight; 0 if not known, as for a quantised one."""


@dataclass(frozen=True)
class BuiltBase(Noun):
    """A base in a folder that transformers loads, and its properties."""

    spec: BaseSpec
    weights_sha256: str
    fingerprint: Fingerprint
    linear: tuple[LinearSize, ...]
    """In the order of the model."""
    licence: str = ""

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """(IN, OUT) of every linear layer, by module path."""
        return {size.path: (size.in_features, size.out_features) for size in self.linear}

    @property
    def norms(self) -> dict[str, float]:
        """The known Frobenius norms of linear layers' weights, by module path."""
        return {size.path: size.norm for size in self.linear if size.norm}


@dataclass(frozen=True)
class AdapterRef(Noun):
    """Where an adapter is published, at one revision; never a branch."""

    repo_id: str
    """`owner/name` on the Hub, or `path:<folder name>`."""
    revision: str
    """The commit; for a folder `sha256:` and the hash of its weights."""
    subfolder: str = ""

    def __post_init__(self) -> None:
        pinned = self.revision.removeprefix("sha256:")
        if not (SHA256 if pinned != self.revision else COMMIT).fullmatch(pinned):
            raise ValueError(f"{self.repo_id}: {self.revision!r} is not a commit of 40 hex digits")


HEADS = {"lm_head", "embed_out"}
"""Names of the layer that gives the logits."""


def heads_in(paths: Iterable[str]) -> list[str]:
    """The modules of these that give the logits."""
    return [path for path in paths if path.rpartition(".")[2] in HEADS]


class Place(NamedTuple):
    """The parts of a module's path: `model.layers`, 3, `self_attn.q_proj`."""

    stem: str
    layer: int
    leaf: str


def place_of(path: str) -> Place | None:
    """Split the path of a module in a numbered layer, the first in the path; else None."""
    match = re.fullmatch(r"(.+?)\.(\d{1,6})\.(.+)", path)
    return Place(match[1], int(match[2]), match[3]) if match else None


@dataclass(frozen=True)
class AdapterModule(Noun):
    """One linear layer that an adapter changes: y += scaling · B (A x)."""

    path: str
    """The module's path in the base model, such as `model.layers.0.self_attn.q_proj`."""
    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    scaling: float
    """lora_alpha / r, or lora_alpha / √r with rsLoRA, as PEFT computes it for this module."""

    @property
    def num_parameters(self) -> int:
        """The numbers in A [r, IN] and B [OUT, r]."""
        return self.r * (self.in_features + self.out_features)


@dataclass(frozen=True)
class AdapterSpec(Spec):
    """A published LoRA, with the facts that its tensors show."""

    kind: ClassVar[str] = "adapter"

    weights_sha256: str
    base_model: str
    """From its config, unchecked; empty if the config names none."""
    use_rslora: bool
    dtype: str
    """`F32`, `F16` or `BF16`."""
    modules: tuple[AdapterModule, ...]
    """Sorted by path."""
    stripped: tuple[str, ...] = ()
    """Tensors of the file that are left out by policy, sorted."""
    found_in: str = ""
    """`<SHA-256 of a stack>/<name>`, if only that stack holds it. The hash of its weights is then
    as the checkpoint states, `base_model` and `dtype` are empty, and `lora_alpha` is computed from
    the scaling, without rsLoRA."""


@dataclass(frozen=True)
class Reason(Noun):
    """One of the reasons for a verdict: a code for programs, a sentence for people."""

    code: str
    """Stable, such as `dora` or `rank_mismatch`."""
    message: str
    """Which one, what it has, what is needed, what to do."""


@dataclass(frozen=True)
class FusedSpec(Spec):
    """A stack of adapters on one base. Expert `e` of every gate is `adapter_ids[e]`."""

    kind: ClassVar[str] = "fused"

    base_id: ArtifactId
    names: tuple[str, ...]
    """The experts' names, in the order of `adapter_ids`."""
    adapter_ids: tuple[ArtifactId, ...]
    bare: tuple[str, ...] = ()
    """Modules without ranks: only a dropped expert changed them, but their gates decide for others.
    A recipe's stack has none."""

    @property
    def parents(self) -> tuple[ArtifactId, ...]:
        return (self.base_id, *self.adapter_ids)


@dataclass(frozen=True)
class FusedCheckpoint(Noun):
    """A stack on disk."""

    spec: FusedSpec
    weights_sha256: str
    """Of `experts.safetensors`."""


@dataclass(frozen=True)
class MergeSpec(Spec):
    """The experts of a stack merged into the base's weights: a control, never stored."""

    kind: ClassVar[str] = "merge"
    made_of: ClassVar[tuple[str, ...]] = ("fused_id",)

    fused_id: ArtifactId
    method: str
    """`linear`, `ties` or `dare_ties`, as PEFT computes them from each expert's whole delta."""
    weight: float
    """The weight of every expert."""
    density: float = 1.0
    """Share of each delta's numbers that is kept."""
    seed: int = 0
    """Of the random choices of `dare_ties`."""


@dataclass(frozen=True)
class PoolSpec(Spec):
    """Prompts without labels, to be divided among the experts of a stack."""

    kind: ClassVar[str] = "pool"
    made_of: ClassVar[tuple[str, ...]] = ("fused_id",)

    fused_id: ArtifactId
    prompts_sha256: str
    """Of the canonical JSON of all prompts, in order; empty where experts write them."""
    examples_per_expert: int
    """The most prompts that one expert gets and answers."""
    seed: int = 0
    template: str = "auto"
    """As in `RouterSpec`."""
    known_sha256: str = ""
    """Of the canonical JSON of the prompts of experts that have examples, by expert; these prompts
    are compared with the pool's. Empty if no expert has examples."""
    writers: tuple[str, ...] = ()
    """Experts that write the prompts themselves."""


@dataclass(frozen=True)
class PoolShare(Noun):
    """The part of a pool that one expert got."""

    expert: str
    """Empty for the prompts that no expert got."""
    num_prompts: int
    num_clusters: int
    score: float
    """How much larger the expert's updates are on these prompts than on the whole pool, in standard
    deviations; for prompts that no expert got, the largest value of any expert. If experts wrote
    the prompts: their log likelihood under the expert minus that under the base, nats per token."""
    lead: float
    """The score minus that of the next expert. If experts wrote the prompts: their log likelihood
    in the user's place minus that of the expert's answers there."""


@dataclass(frozen=True)
class PoolBuild(Noun):
    """The result of dividing a pool."""

    spec: PoolSpec
    labels_sha256: str
    """Of a file with a line of JSON for each prompt: prompt, expert, score, lead, and its answer if
    it is an example."""
    shares: tuple[PoolShare, ...]
    """One for each expert in order, and one for the prompts that no expert got."""
    wall_seconds: float
    device: str


@dataclass(frozen=True)
class Publication(Noun):
    """A repository that holds an artifact; anyone may have published it."""

    artifact_id: ArtifactId
    repo_id: str
    revision: str
    texts_sha256: str = ""
    """Of all files of the checkpoint that are not tensors; they name the tensors by hash."""
    private: bool = True
    tag: str = ""
    """Its tag there; empty in records of earlier versions."""
