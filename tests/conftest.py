"""A tiny real world for every test: models, tokenizers and adapters are built, never downloaded.

Heavy libraries are imported by the fixtures that need them, so that the store's tests start fast.
"""

# ruff: noqa: PLC0415, S106

from __future__ import annotations

import atexit
import copy
import fcntl
import gc
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import warnings
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from pipelines.workspace.environment import prepare, use_prefect_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from meteora.adapters.tensors import Adapter
    from meteora.checkpoint.manifest import Manifest

# Matmuls this small lose time to threads, and much of it where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What models and libraries leave lives long: looking through it for garbage takes a lot of time.
gc.set_threshold(20_000, 20, 20)

# A shell's background job ignores Ctrl-C, and so would each process that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No example fails for the time it took: other work on the machine takes time, too.
settings.register_profile("patient", settings.default, deadline=None)
settings.load_profile("patient")

# Triton asks at its import whether kernels are interpreted: they are where there is no GPU.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the file that takes longest, so that no process waits for another in the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name != "test_quickstart.py")


def shared_folder() -> Path:
    """One for all processes of these tests, so that one server serves them; gone with the last."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"meteora-tests-{run}"
    folder.mkdir(mode=0o700, exist_ok=True)
    users = (folder / "users").open("w")
    fcntl.flock(users, fcntl.LOCK_SH)

    def leave() -> None:
        with users, suppress(BlockingIOError):
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)

    atexit.register(leave)
    return folder


# Where a server is, and its secret: what `use_local_server` puts into the environment
SERVER = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING")

# Prefect reads its settings when it is imported
PREFECT_HOME = shared_folder()


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one process of these tests fills for all; the others wait for it."""
    folder = PREFECT_HOME / name
    with (PREFECT_HOME / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = folder.with_name(f"{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


# What a developer's shell says of the Hub: its libraries read it when they are imported
HUB = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE")

for name in (*SERVER, *HUB):
    os.environ.pop(name, None)
prepare()
use_prefect_of(PREFECT_HOME)


def copy_database(folder: Path) -> None:
    """Copy the database of the server that serves all tests, as it is now."""
    with (
        closing(sqlite3.connect(PREFECT_HOME / "prefect" / "prefect.db")) as used,
        closing(sqlite3.connect(folder / "prefect.db")) as copy,
    ):
        used.backup(copy)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HIDDEN, INTERMEDIATE, LAYERS, HEADS = 32, 48, 2, 4


@contextmanager
def peft_is_behind() -> Generator[None]:
    """PEFT 0.21 asks transformers 5.23 for an attribute that it deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def load_peft(base: Path, adapter: Path) -> PeftModel:
    """What PEFT makes of an adapter: the oracle."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    with peft_is_behind():
        return PeftModel.from_pretrained(model, adapter).eval()


@dataclass(frozen=True)
class World:
    """A base, adapters that PEFT saved for it, and the fused checkpoint made of them."""

    base: Path
    adapters: dict[str, Path]
    checkpoint: Path
    manifest: Manifest

    def load_base(self, dtype: Any = "float32") -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.base, dtype=dtype).eval()

    def load_peft(self, name: str) -> PeftModel:
        return load_peft(self.base, self.adapters[name])

    def load(self, **asked: Any) -> PreTrainedModel:
        import meteora

        return meteora.load(self.checkpoint, base_folder=self.base, **asked)[0]


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    """Float32 rounding breaks a default tolerance once in a thousand draws: draw the same ones."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _tables_are_made_once(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """Making the tables of an empty index takes a tenth of a second: it is made once, and copied.

    All else is done with the copy as with one that `build` has just made. Processes that tests
    start make their own, and `tests/store/test_index.py` says that the two are the same.
    """
    if "store.index" not in sys.modules:
        yield
        return
    from store.index import Index
    from store.ledger import Ledger

    build = Index.build
    home = tmp_path_factory.mktemp("empty")
    build(Ledger(home).index, home / "empty.duckdb", [])

    def build_on_copy(index: Index, database: Path, *names: Any, **room: Any) -> Any:
        if not database.exists():
            shutil.copyfile(home / "empty.duckdb", database)
        return build(index, database, *names, **room)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Index, "build", build_on_copy)
        yield


@pytest.fixture
def disk_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record is on the disk when it says so, at some milliseconds each: others test that."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, so that any text has its ids; padding on the left, as for generation."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def _tiny_config(kind: str, vocab_size: int) -> Any:
    """Two layers of 32, with random weights large enough that tokens differ."""
    import transformers as hf

    old: dict[str, Any] = {
        "vocab_size": vocab_size,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 512,
        "hidden_size": HIDDEN,
    }
    stateful = {key: value for key, value in old.items() if key != "num_attention_heads"}
    llama = old | {"intermediate_size": INTERMEDIATE, "num_key_value_heads": 2}
    gemma = llama | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    served = llama | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    served |= {"num_key_value_heads": 1, "head_dim": 32}  # the least that vLLM takes
    windows: dict[str, Any] = {
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    old_served = old | {"hidden_size": 64, "num_attention_heads": 2}
    gemma3n = {
        "layer_types": windows["layer_types"] * 2,
        "sliding_window": 64,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": vocab_size,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    gemma4 = {name: gemma3n[name] for name in ("num_hidden_layers", "num_kv_shared_layers")}
    gemma4 |= {name: gemma3n[name] for name in gemma3n if name.endswith("per_layer_input")}
    gemma4 |= {"layer_types": gemma3n["layer_types"], "attention_k_eq_v": True}
    gemma4 |= {"global_head_dim": 16, "num_global_key_value_heads": 1}
    opt = {"ffn_dim": INTERMEDIATE, "init_std": 0.2}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "vllm_llama": ("LlamaConfig", served),
        "vllm_mistral": ("MistralConfig", served | {"sliding_window": 32}),
        "vllm_qwen2": ("Qwen2Config", served),
        "vllm_qwen3": ("Qwen3Config", served),
        "vllm_gemma2": ("Gemma2Config", served | windows | {"query_pre_attn_scalar": 32}),
        "vllm_gemma3": ("Gemma3TextConfig", served | windows | {"query_pre_attn_scalar": 32}),
        "vllm_gemma3n": ("Gemma3nTextConfig", served | gemma3n),
        "vllm_phi": ("PhiConfig", served | {"num_key_value_heads": 2}),
        "vllm_gpt2": ("GPT2Config", old_served | {"n_inner": 96}),
        "vllm_gpt_neox": ("GPTNeoXConfig", old_served | {"intermediate_size": 96}),
        "vllm_opt": ("OPTConfig", old_served | opt | {"word_embed_proj_dim": 64}),
        "vllm_bloom": ("BloomConfig", old_served),
        "llama": ("LlamaConfig", llama),
        "llama_64": ("LlamaConfig", llama | {"hidden_size": 64, "intermediate_size": 128}),
        "mistral": ("MistralConfig", llama | {"sliding_window": 4}),
        "qwen2": ("Qwen2Config", llama),
        "qwen3": ("Qwen3Config", llama | {"head_dim": 8}),
        "gemma2": ("Gemma2Config", gemma),
        "gemma3": (
            "Gemma3TextConfig",
            gemma | {"layer_types": ["sliding_attention", "full_attention"]},
        ),
        "gemma3n": ("Gemma3nTextConfig", llama | gemma3n | {"head_dim": 8}),
        "gemma4": ("Gemma4TextConfig", gemma | gemma4),
        "phi": ("PhiConfig", llama),
        "phi3": (
            "Phi3Config",
            llama
            | {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10_000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [3.0, 4.0, 5.0, 6.0],
                    "original_max_position_embeddings": 64,
                    "partial_rotary_factor": 1.0,
                },
                "original_max_position_embeddings": 64,
            },
        ),
        "gpt2": ("GPT2Config", old | {"n_inner": INTERMEDIATE}),
        "gpt_neox": ("GPTNeoXConfig", old | {"intermediate_size": INTERMEDIATE}),
        "opt": ("OPTConfig", old | opt | {"word_embed_proj_dim": HIDDEN}),
        "bloom": ("BloomConfig", old),
        "deepseek": (
            "DeepseekV3Config",
            llama
            | {
                "num_key_value_heads": 4,
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "qk_rope_head_dim": 4,
                "v_head_dim": 8,
                "qk_nope_head_dim": 4,
                "first_k_dense_replace": 1,
            },
        ),
        "bamba": (
            "BambaConfig",
            llama
            | {
                "mamba_n_heads": 8,
                "mamba_d_head": 8,
                "mamba_d_state": 8,
                "mamba_chunk_size": 8,
                "attn_layer_indices": [1],
            },
        ),
        "doge": ("DogeConfig", llama),
        "jetmoe": ("JetMoeConfig", llama | {"kv_channels": 8, "num_local_experts": 4}),
        "minimax": (
            "MiniMaxConfig",
            llama
            | {
                "layer_types": ["linear_attention", "full_attention"],
                "num_local_experts": 2,
                "head_dim": 8,
            },
        ),
        "mamba": ("MambaConfig", stateful | {"state_size": 8, "time_step_rank": 4}),
        "rwkv": ("RwkvConfig", stateful),
    }
    name, asked = kinds[kind]
    return getattr(hf, name)(**asked)


@pytest.fixture(scope="session")
def build_base(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Callable[[str], Path]:
    """A function from an architecture's name to the folder of a tiny base of it."""
    built: dict[str, Path] = {}
    own = copy.deepcopy(tokenizer)  # a test may give the session's a chat template for a while

    def build(kind: str) -> Path:
        if kind not in built:
            import torch
            from transformers import AutoModelForCausalLM

            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_tiny_config(kind, len(tokenizer)))
            built[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(built[kind])
            own.save_pretrained(built[kind])
        return built[kind]

    return build


@pytest.fixture(scope="session")
def build_adapter() -> Callable[..., Path]:
    """A function that lets PEFT make and save an adapter with random A and B."""

    def build(base: Path, out: Path, *, seed: int, dtype: Any = None, **lora: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with peft_is_behind():
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # PEFT starts it at zero, and an adapter of zeros tests nothing
                torch.nn.init.normal_(parameter, std=0.2)
        (model if dtype is None else model.to(dtype)).save_pretrained(str(out))
        return out

    return build


@pytest.fixture(scope="session")
def peft_model() -> Callable[[Path, Path], PeftModel]:
    """A function from the folders of a base and an adapter to PEFT's own model."""
    return load_peft


@pytest.fixture(scope="session")
def fuse_adapters() -> Callable[..., Manifest]:
    """A function that stacks adapters on a base into a checkpoint folder, router `uniform`."""

    def fuse_them(base: Path, adapters: dict[str, Path], out: Path) -> Manifest:
        from meteora.adapters import reader
        from meteora.artifacts import RouterOptions
        from meteora.base.shapes import fingerprint_of
        from meteora.base.sources import weights_sha256
        from meteora.checkpoint.manifest import (
            EXPERTS,
            MANIFEST,
            BaseEntry,
            ExpertEntry,
            Manifest,
        )
        from meteora.checkpoint.stack import module_entries, stack_adapters

        read: list[Adapter] = [reader.read(folder) for folder in adapters.values()]
        out.mkdir(parents=True, exist_ok=True)
        stack_adapters(read, out / EXPERTS)
        revision = f"sha256:{weights_sha256(base)}"
        manifest = Manifest(
            base=BaseEntry(f"path:{base.name}", revision, fingerprint_of(base)),
            experts=tuple(
                ExpertEntry(
                    name, adapter.spec.id, f"path:{name}", "", adapter.spec.weights_sha256, "", ""
                )
                for name, adapter in zip(adapters, read, strict=True)
            ),
            modules=module_entries([adapter.spec for adapter in read]),
            router=RouterOptions("uniform", 1, 1.0),
        )
        (out / MANIFEST).write_text(manifest.to_json())
        return manifest

    return fuse_them


@pytest.fixture(scope="session")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    build_base: Callable[[str], Path],
    build_adapter: Callable[..., Path],
    fuse_adapters: Callable[..., Manifest],
) -> World:
    """A tiny Llama and four adapters that differ in everything that may differ."""
    base, folder = build_base("llama"), tmp_path_factory.mktemp("adapters")
    asked: dict[str, dict[str, Any]] = {
        "all_seven": {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, *MLP]},
        "attention": {
            "r": 3,  # no power of two
            "lora_alpha": 3,
            "target_modules": list(ATTENTION),
            "use_rslora": True,
        },
        "q_and_v": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        "patterns": {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": [1],
            "rank_pattern": {"down_proj": 5},
            "alpha_pattern": {"down_proj": 20},
        },
    }
    adapters = {
        name: build_adapter(base, folder / name, seed=seed, **lora)
        for seed, (name, lora) in enumerate(asked.items(), start=1)
    }
    checkpoint = folder / "fused"
    return World(base, adapters, checkpoint, fuse_adapters(base, adapters, checkpoint))


@pytest.fixture(scope="session")
def prefect_server() -> Generator[str]:
    """The address of one real server for all tests; what they start inherits its secret."""
    # importing it sets logging up anew; absl, which rouge-score brings, then closes the stderr that
    # it knows, unless that is the present one: so not while a test has another in its place
    import prefect.main  # noqa: F401
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        temporary_settings,
    )

    from pipelines.flows.local_server import use_local_server

    use_local_server(PREFECT_HOME)  # until this process ends
    made_once("new-database", copy_database)  # before anything is in it
    url, secret = (os.environ[name] for name in SERVER)
    with temporary_settings(
        {
            PREFECT_API_URL: url,
            PREFECT_API_AUTH_STRING: secret,
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # a flow's end waits up to 1 s for its thread
        }
    ):
        yield url
    for name in SERVER:
        del os.environ[name]


@pytest.fixture(scope="session")
def new_database(prefect_server: str) -> Path:  # noqa: ARG001  (it made one)
    """The database of a server that has just started first, which takes it seconds to make."""
    return PREFECT_HOME / "new-database" / "prefect.db"
