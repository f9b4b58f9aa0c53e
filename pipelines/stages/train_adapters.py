"""Train adapters on a recipe's own rows, for experts whose folders do not exist.

PEFT makes the LoRA and its files; the loop goes over batches of rows. The loss is over the answers,
not over the prompts.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import warnings
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from meteora.adapters.files import CONFIG, PEFT_WEIGHTS
from meteora.artifacts import COMMIT, BaseSpec, MeteoraError
from meteora.base.chat_template import encode_pair, encode_prompt
from meteora.base.loading import load_folder
from meteora.base.padding import padded
from meteora.base.placement import is_out_of_memory, placed
from meteora.base.shapes import shape_of
from meteora.base.sources import PATH
from meteora.base.temporary_folder import temporary_folder
from meteora.fitting.joint import DivergedError
from meteora.fitting.losses import computed_again, decoder_layers
from meteora.kernels.onednn import use_in
from meteora.untrusted.findings import brief, counted, did_you_mean
from pipelines.admission.sources import local_folder, resolve_base, token_of_rows
from pipelines.data.row_sources import read_rows, row_place
from pipelines.data.rows import Row, refuse_overlap
from pipelines.evaluation.harness import room_of
from pipelines.evaluation.tasks import make_tasks
from pipelines.planning.room import having_room
from pipelines.recipe.recipe import AUTO, ExpertSection
from pipelines.stages.build import build_base
from pipelines.stages.open_model import tokenizer_of_gates
from pipelines.workspace.bases import require_sound
from pipelines.workspace.console import bar, say
from pipelines.workspace.context import RunContext, put_in_place
from pipelines.workspace.machine import choose_device, device_name, is_too_large, memory_bytes
from pipelines.workspace.recorded_run import one_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BATCH_SIZE = 8
"""Rows of a step."""
TOKENS_AT_ONCE = 1024
"""The tokens of one pass, padding included; a longer batch is divided. A single longer row keeps no
activations inside layers: each layer is computed again. Llama-2-13B in bfloat16, with a LoRA in
float32 on every linear layer, keeps 14 MB a token: 14 GB beside 26 GB of weights, and 41 GB for an
article of 3,000 tokens. Without the activations inside layers it keeps 0.4 MB a token."""
MOST_ROWS = 1000
"""The most rows of each task."""
SEED = 0
IGNORED = -100
"""The label of tokens that `cross_entropy` leaves out."""
Lesson = tuple[list[int], list[int]]
"""Token ids, and their labels: the same ids in the answer, `IGNORED` in the prompt."""
T = TypeVar("T")


class AdapterTrainingError(MeteoraError):
    """An adapter cannot be trained here, or there is nothing to train it on."""


@dataclass(frozen=True)
class Training:
    """The settings of the training; the default rank is that of MeteoRA's paper."""

    r: int = 8
    """The rank on each linear layer but the head; `lora_alpha` is twice as much."""
    steps: int = 1000
    """Steps of `BATCH_SIZE` rows each."""
    peak: float = 5e-4
    """The highest learning rate: reached after ten steps, then falling along a cosine."""


def train(work: RunContext, settings: Training, only: Collection[str] = ()) -> Iterator[Path]:
    """Train each adapter of the recipe whose `path:` folder does not exist; yield the folders.

    Args:
        only: names of experts; empty for all

    Raises:
        AdapterTrainingError: an expert cannot be trained, or the device has too little memory.
        ExamplesError: rows cannot be read, or a training row is also a test row.
        DivergedError: a gradient is not finite.
        BusyError: another process trains the adapters of this recipe.
    """
    experts = _missing(work, only)
    if not experts:
        say("there is no adapter to train; folders that are there stay as they are")
        return
    gates = work.recipe.router.kind == "gate"
    skip = work.recipe.gates.examples_per_expert if gates else 0
    rows = training_rows(work, experts, skip=skip)
    spec, device = resolve_base(work), choose_device()
    name, on = f"adapters of {work.key}", device_name(device)
    with one_stage(work, name, work.recipe_sha256, on, "train"):
        build_base(work, spec)
        require_sound(work.ledger, spec)
        model, tokenizer = _open_base(work, spec, device)
        for expert in experts:
            if _is_there(folder := local_folder(work, expert)):
                say(f"{expert.name}: {folder} came meanwhile, and stays as it is")
                continue
            own = rows[expert.name]
            yield _train_one(work, expert, own, skip, spec, model, tokenizer, settings)


def _missing(work: RunContext, only: Collection[str]) -> list[ExpertSection]:
    """The experts to train: those of the recipe whose folders do not exist."""
    known = {expert.name: expert for expert in work.recipe.experts}
    for name in only:
        if name not in known:
            raise AdapterTrainingError(
                f"{name}: the recipe has no such expert{did_you_mean(name, known)}"
            )
        if not known[name].adapter.startswith(PATH):
            raise AdapterTrainingError(
                f"{name}: the recipe takes its adapter from the Hub, {known[name].adapter}; give it"
                " a `path:` where it is to be trained"
            )
    missing = []
    for expert in work.recipe.experts:
        if not expert.adapter.startswith(PATH) or expert.name not in (only or known):
            continue
        if _is_there(folder := local_folder(work, expert)):
            if not (folder / CONFIG).is_file():
                raise AdapterTrainingError(
                    f"{expert.name}: {folder} is there and holds no adapter, and nothing is written"
                    " over it; take it away, or name another folder in the recipe"
                )
            say(f"{expert.name}: {folder} is there, and stays as it is")
            continue
        if expert.examples in {None, "", AUTO}:
            raise AdapterTrainingError(
                f"{expert.name}: the recipe names no examples of it to train on; give it"
                " `examples`, or name other experts with --only"
            )
        missing.append(expert)
    _refuse_one_folder(work, missing)
    return missing


def _refuse_one_folder(work: RunContext, experts: Sequence[ExpertSection]) -> None:
    """Refuse two experts that would be written to one folder; only the first would be trained."""
    names: dict[Path, str] = {}
    for expert in experts:
        folder = local_folder(work, expert)
        other = names.setdefault(folder.resolve(), expert.name)
        if other != expert.name:
            raise AdapterTrainingError(
                f"{other} and {expert.name} name one folder, {folder}; give each its own"
            )


def _is_there(folder: Path) -> bool:
    """Whether an adapter's folder has files; also True for a file in its place."""
    return any(folder.iterdir()) if folder.is_dir() else folder.exists()


def training_rows(
    work: RunContext, experts: Sequence[ExpertSection], *, skip: int
) -> dict[str, list[Row]]:
    """The training rows of each expert, none of them a test row; `MOST_ROWS` at most.

    Args:
        skip: the first rows, which gates are fitted to; equal later rows are left out, too

    Raises:
        AdapterTrainingError: there are no other rows.
        ExamplesError: rows cannot be read, or are also test rows of the recipe.
    """
    recipe, folder = work.recipe, work.folder
    read = partial(read_rows, token_of=token_of_rows(recipe.hub))
    sources = {expert.name: str(expert.examples) for expert in experts}
    training: dict[str, list[Row]] = {}
    numbers: dict[str, list[int]] = {}
    for name, source in sources.items():
        rows = read(source, folder, skip + MOST_ROWS)
        fitted = {row.sha256 for row in rows[:skip]}
        own = [n for n, row in enumerate(rows) if n >= skip and row.sha256 not in fitted]
        if not own:
            raise AdapterTrainingError(
                f"{name}: {source} has {counted(len(rows), 'row')}, and none to train on beside the"
                f" first {skip}, which gates are fitted to; a smaller `examples_per_expert` leaves"
                " some"
            )
        training[name], numbers[name] = [rows[n] for n in own], own
    tests = make_tasks(recipe.experts, recipe.benchmark, folder, read)
    refuse_overlap(
        training,
        {name: task.rows for name, task in tests.items()},
        lambda name, number: row_place(sources[name], folder, numbers[name][number]),
        kind="a row to train {expert} on",
    )
    return training


def _open_base(
    work: RunContext, spec: BaseSpec, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base on one device: in bfloat16 on a GPU, else in the dtype of its files.

    Gradients in float16 would underflow, so a float16 base is loaded in bfloat16 everywhere.
    """
    folder = work.base_folder(spec)
    shape = replace(shape_of(folder), quantise=spec.quantise)
    room = memory_bytes(device)
    if is_too_large(shape.loaded_bytes, room):
        raise AdapterTrainingError(
            f"{work.recipe.base} has {shape.loaded_bytes / 1e9:,.1f} GB, and {device}"
            f" {room / 1e9:,.1f} GB, which leaves too little to train with; take"
            " `quantise: 4bit`, or a larger device"
        )
    narrow = device.startswith("cuda") or shape.dtype == torch.float16
    return load_folder(
        folder,
        torch.bfloat16 if narrow else "auto",
        options=placed({"": device}),
        quantise=spec.quantise,
    )


def _train_one(
    work: RunContext,
    expert: ExpertSection,
    rows: Sequence[Row],
    skip: int,
    spec: BaseSpec,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Training,
) -> Path:
    """Train the adapter of one expert; the base stays unchanged. Its folder appears when whole."""
    tokenizer = tokenizer_of_gates(tokenizer, work.recipe.benchmark.template)
    room = room_of(base.config)
    short = having_room(rows, room, tokenizer)
    if not short:
        raise AdapterTrainingError(
            f"{expert.name}: each of its {len(rows)} rows is longer with its answer than the"
            f" {room} tokens that the base has room for; take shorter ones"
        )
    if left_out := len(rows) - len(short):
        say(
            f"{expert.name}: {counted(left_out, 'row')} longer than the base has room for",
            "left out",
        )
    on_hub = COMMIT.fullmatch(spec.base_revision)
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=2 * settings.r,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        revision=spec.base_revision if on_hub else None,
    )
    try:
        with peft_is_behind():
            model = get_peft_model(base, config)
    except ValueError as error:
        raise AdapterTrainingError(
            f"{expert.name}: PEFT puts no LoRA on each linear layer of this base ({brief(error)});"
            " train this adapter with PEFT itself"
        ) from error
    batches = lessons(tokenizer, shuffled_for_ever(short))
    folder = local_folder(work, expert)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = partial(temporary_folder, folder.parent, ".training-")
    with beside():  # a read-only place fails at once; a kill during the training leaves nothing
        pass
    try:
        losses = fit(model, batches, steps=settings.steps, peak=settings.peak, what=expert.name)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise AdapterTrainingError(
            f"{expert.name}: the device has too little memory to train it; take"
            " `quantise: 4bit`, rows with shorter prompts, or a larger device"
        ) from error
    with beside() as scratch:
        made = scratch / "adapter"
        # a local base is named without its path, which means nothing on another machine
        name = spec.base_model if on_hub else spec.base_model.rpartition("/")[2]
        save(model, made, name.removeprefix(PATH))
        about = _card(expert, spec, len(short), skip, losses, settings)
        (made / "README.md").write_text(about, encoding="utf-8")
        put_in_place(made, folder)
    with peft_is_behind():
        model.unload()
    say(f"{expert.name}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; {folder}")
    return folder


def _card(
    expert: ExpertSection,
    spec: BaseSpec,
    num_rows: int,
    skip: int,
    losses: Sequence[float],
    settings: Training,
) -> str:
    """The README of an adapter: its base, its rows and its training."""
    front = {"base_model": spec.base_model} if COMMIT.fullmatch(spec.base_revision) else {}
    front |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    head = yaml.safe_dump({**front, "tags": ["lora"]}, sort_keys=False)
    after = f", those after the first {skip}, which gates are fitted to" if skip else ""
    return f"""---
{head}---

# {expert.name}

A LoRA for one task, trained by `meteora train` (meteora-pipelines {version("meteora-pipelines")}).

- Base: `{spec.base_model}` at `{spec.base_revision}`
- Rows: {num_rows} of `{expert.examples}`{after}; none is a test row of the recipe
- LoRA: r {settings.r}, lora_alpha {2 * settings.r}, no dropout, on every linear layer but the head
- Training: {settings.steps} steps of {BATCH_SIZE} rows, the loss of answers alone; learning rate
  {settings.peak:g} at most; loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last
"""


@contextmanager
def peft_is_behind() -> Generator[None]:
    """Hide a warning: PEFT 0.21 reads an attribute that transformers 5.23 deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def shuffled_for_ever(rows: Sequence[T]) -> Iterator[T]:
    """All rows in random order, then all in another, and so on."""
    rng = random.Random(SEED)  # noqa: S311  (an order of rows, no secret)
    while True:
        yield from rng.sample(rows, len(rows))


def lesson(tokenizer: PreTrainedTokenizerBase, row: Row) -> Lesson:
    """The tokens of a row's prompt and answer, and their labels."""
    ids = encode_pair(tokenizer, row.prompt, row.response)
    start = len(encode_prompt(tokenizer, row.prompt))
    return ids, [IGNORED] * start + ids[start:]


def lessons(
    tokenizer: PreTrainedTokenizerBase, stream: Iterator[Row], batch_size: int = BATCH_SIZE
) -> Iterator[list[Lesson]]:
    while batch := list(itertools.islice(stream, batch_size)):
        yield [lesson(tokenizer, row) for row in batch]


def fit(
    model: nn.Module, batches: Iterator[list[Lesson]], *, steps: int, peak: float, what: str
) -> list[float]:
    """Train all parameters that require gradients, a step a batch; returns the loss of each step.

    Args:
        peak: as in `Training`
        what: the name of the trained adapter in messages

    Raises:
        DivergedError: a gradient is not finite.
    """
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights, layers = list(learning.values()), decoder_layers(model, learning)
    device = weights[0].device
    use_in(model)
    optimizer = torch.optim.AdamW(weights, lr=peak, weight_decay=0.0)
    losses = []
    with bar(f"training {what}", steps, "steps") as advance:
        for step, batch in enumerate(itertools.islice(batches, steps)):
            warm = min(1.0, (step + 1) / 10)
            for group in optimizer.param_groups:
                group["lr"] = peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            losses.append(0.0)
            counted = sum(map(_num_learnt, batch))
            for few in _divided(batch):
                ids = padded([ids for ids, _ in few]).to(device)  # no mask: padding is at the end
                labels = padded([labels for _, labels in few], IGNORED).to(device)
                with computed_again(layers) if ids.numel() > TOKENS_AT_ONCE else nullcontext():
                    loss = _summed_loss(model, ids, labels) / counted
                    loss.backward()
                losses[-1] += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
            if not norm.isfinite():
                raise DivergedError(
                    f"{what}, step {step + 1}: a gradient is not finite; lower the learning rate,"
                    " or look for NaN in the base"
                )
            optimizer.step()
            optimizer.zero_grad()
            advance(1)
    return losses


def _summed_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross-entropy of all answer tokens.

    No logits are computed at positions where no row has an answer token: with a vocabulary of
    262,144 and short prompts they would take a quarter of a step's time.

    Args:
        ids: [B, L]
        labels: [B, L], `IGNORED` outside answers
    """
    following = labels[:, 1:]
    places = (following != IGNORED).any(0).nonzero().flatten()
    # no cache: a layer that is computed again would add its tokens twice
    logits = model(input_ids=ids, logits_to_keep=places, use_cache=False).logits
    predicted = logits.flatten(0, 1).float(), following[:, places].flatten()
    return cross_entropy(*predicted, ignore_index=IGNORED, reduction="sum")


def _num_learnt(one: Lesson) -> int:
    """The number of predicted tokens; nothing predicts the first one."""
    return sum(label != IGNORED for label in one[1][1:])


def _divided(batch: Sequence[Lesson]) -> list[list[Lesson]]:
    """The batch in parts for one pass each: at most `TOKENS_AT_ONCE` tokens, or one row."""
    passes: list[list[Lesson]] = [[]]
    for one in batch:
        grown = [*passes[-1], one]
        if passes[-1] and len(grown) * max(len(ids) for ids, _ in grown) > TOKENS_AT_ONCE:
            passes.append([one])
        else:
            passes[-1] = grown
    return passes


def save(model: PeftModel, folder: Path, base: str) -> None:
    """Save an adapter in PEFT's format, in float16, with the name of its base."""
    # float16 halves the file; bfloat16 would keep only 8 bits of mantissa
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    model.peft_config["default"].base_model_name_or_path = base
    # embeddings are not trained; to decide this itself, PEFT would ask the Hub
    model.save_pretrained(str(folder), save_embedding_layers=False)
    shutil.copymode(folder / CONFIG, folder / PEFT_WEIGHTS)  # safetensors writes it for us alone
