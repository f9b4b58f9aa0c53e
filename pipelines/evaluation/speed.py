"""The speed and memory of a routed model against its own base, on the same machine."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from meteora.artifacts import Rate, SpeedBuild, SpeedSpec
from meteora.base.placement import input_device
from meteora.base.temporary_folder import temporary_folder
from meteora.model.fused import without_experts
from meteora.routing.layer import routed_layers
from meteora.routing.passes import cache_name
from pipelines.evaluation.measurements import BASE, FUSED
from pipelines.scoring.intervals import interval_of_median
from pipelines.workspace.machine import device_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PHASES = ("prefill", "decode")


def time_model(
    model: PreTrainedModel,
    spec: SpeedSpec,
    stored_bytes: int,
    advance: Callable[[int], None] = lambda _rounds: None,
) -> SpeedBuild:
    """Time the routed model and its base in turns; each is first in every other round.

    Both run on the same random tokens, so neither stops early. An extra first round warms up and
    does not count. Each round has one ratio of two times; the result is their median.

    Args:
        stored_bytes: of experts and gates, on the disk
    """
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    vocab_size = model.config.get_text_config().vocab_size
    shape = (spec.batch_size, spec.prompt_tokens + spec.new_tokens)
    ids = torch.randint(vocab_size, shape, generator=generator).to(input_device(model))
    seconds: dict[tuple[str, str], list[float]] = {
        (system, phase): [] for system in (BASE, FUSED) for phase in PHASES
    }
    for number in range(spec.rounds + 1):
        for system in (BASE, FUSED) if number % 2 else (FUSED, BASE):
            with without_experts(model) if system == BASE else nullcontext():
                times = _one_round(model, ids, spec.prompt_tokens)
            if number:
                for phase, spent in zip(PHASES, times, strict=True):
                    seconds[system, phase].append(spent)
        advance(1)
    prompt = ids[:, : spec.prompt_tokens]
    with without_experts(model):
        base_working = working_bytes(model, prompt)
    base_bytes, added_bytes = _weights(model)
    return SpeedBuild(
        spec=spec,
        rates=tuple(_rate(phase, seconds, spec) for phase in PHASES),
        base_bytes=base_bytes,
        added_bytes=added_bytes,
        base_working_bytes=base_working,
        fused_working_bytes=working_bytes(model, prompt),
        stored_bytes=stored_bytes,
        device=device_name(input_device(model)),
        num_threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        wall_seconds=time.perf_counter() - started,
    )


def _one_round(model: PreTrainedModel, ids: Tensor, prompt_tokens: int) -> tuple[float, float]:
    """Seconds to prefill ids [B, L] up to `prompt_tokens`, and to decode the others one by one."""
    cache = cache_name(model)
    with torch.inference_mode():
        begun = _now(input_device(model))
        out = model(input_ids=ids[:, :prompt_tokens], use_cache=True, logits_to_keep=1)
        filled = _now(input_device(model))
        for place in range(prompt_tokens, ids.shape[1]):
            out = model(
                input_ids=ids[:, place : place + 1],
                use_cache=True,
                **{cache: out[cache]},
            )
        return filled - begun, _now(input_device(model)) - filled


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _rate(phase: str, seconds: dict[tuple[str, str], list[float]], spec: SpeedSpec) -> Rate:
    length = spec.prompt_tokens if phase == "prefill" else spec.new_tokens
    base, fused = seconds[BASE, phase], seconds[FUSED, phase]
    ratios = [ours / theirs for ours, theirs in zip(fused, base, strict=True)]
    low, high = interval_of_median(ratios)
    return Rate(
        phase=phase,
        base_tokens_per_second=spec.batch_size * length / median(base),
        fused_tokens_per_second=spec.batch_size * length / median(fused),
        ratio=median(ratios),
        low=low,
        high=high,
    )


def _weights(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes in memory of the base, and of experts and routers; shared tensors count once."""
    added: set[nn.Module] = set()
    for layer in routed_layers(model).values():
        added |= {layer, layer.stack, *(layer.router.modules() if layer.router else ())}
    own: dict[int, int] = {}
    beside: dict[int, int] = {}
    for module in model.modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        into = beside if module in added else own
        into |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(own.values()), sum(beside.values())


def working_bytes(model: PreTrainedModel, prompt: Tensor) -> int:
    """The peak of bytes that a prefill of ids [B, L] allocates beyond what is allocated before."""
    with torch.inference_mode():
        if prompt.is_cuda:
            torch.cuda.reset_peak_memory_stats(prompt.device)
            before = torch.cuda.memory_allocated(prompt.device)
            model(input_ids=prompt, logits_to_keep=1)
            return torch.cuda.max_memory_allocated(prompt.device) - before
        activities = [ProfilerActivity.CPU]
        with profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
            model(input_ids=prompt, logits_to_keep=1)
    with temporary_folder(Path(tempfile.gettempdir()), "meteora-speed-") as folder:
        trace = folder / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    steps = sorted(
        (event["args"]["Ev Idx"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]"
    )
    now = most = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most
