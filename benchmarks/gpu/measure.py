"""Time and memory on a GPU, by CUDA events and torch's allocator; on a CPU, where scripts are only tried, a clock."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from megatron_vespo.estimate.devices import DEVICES

Work = Callable[[], object]

PEAK_BF16 = {name.upper(): 1e12 * device.bf16_tflops for name, device in DEVICES.items()} | {"H800": 989e12}
"""Dense bfloat16 FLOP/s by a part of the device's name (NVIDIA's data sheets, SXM)."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how large.

    Attributes:
        device: Device of all tensors.
        tiny: Sizes that a CPU goes through in seconds; figures mean nothing then.
        repeats: Times that each way is measured, after ``warm_up`` times unmeasured.
        warm_up: The first calls choose kernels and compile.
    """

    device: torch.device
    tiny: bool
    repeats: int = 10
    warm_up: int = 3

    @property
    def on_gpu(self) -> bool:
        """Whether it is one."""
        return self.device.type == "cuda"

    @property
    def layer_spec(self) -> str:
        """Transformer Engine where there is a GPU."""
        return "transformer_engine" if self.on_gpu else "local"


def milliseconds(setting: Setting, ways: Mapping[str, Work]) -> dict[str, float]:
    """Median time of each way, the ways taking turns, so that a clock that falls slows all of them.

    The host is not waited for between the ways: what is measured is the device, unless the host is slower.
    """
    for _ in range(setting.warm_up):
        for work in ways.values():
            work()
    return _by_events(setting, ways) if setting.on_gpu else _by_clock(setting, ways)


def _by_events(setting: Setting, ways: Mapping[str, Work]) -> dict[str, float]:
    pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in ways}
    torch.cuda.synchronize()
    for _ in range(setting.repeats):
        for name, work in ways.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            stop.record()
            pairs[name].append((start, stop))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in found) for name, found in pairs.items()}


def _by_clock(setting: Setting, ways: Mapping[str, Work]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(setting.repeats):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def peak_bytes(setting: Setting, work: Work) -> int:
    """Most bytes that ``work`` held beyond what was allocated before it; 0 on a CPU."""
    if not setting.on_gpu:
        work()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_memory(setting: Setting) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_flops(setting: Setting) -> float | None:
    """FLOP/s of the device in dense bfloat16; None where that is not known."""
    name = torch.cuda.get_device_name() if setting.on_gpu else ""
    return next((flops for part, flops in PEAK_BF16.items() if part in name), None)
