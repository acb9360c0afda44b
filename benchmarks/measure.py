"""Peak memory of a piece of torch code on the CPU, from the allocations that torch's profiler records."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], *, result_bytes: int = 0) -> int:
    """Most bytes that ``work`` held at one time beyond what was allocated before it; its result counts.

    Memory that libraries get without torch, such as oneDNN's for packing a matrix, is not seen.

    Args:
        work: What to measure.
        result_bytes: Size of one tensor that does not count while it is there, found by its size.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = results = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type() == torch.autograd.DeviceType.CPU:
            held += event.nbytes()
            if result_bytes and abs(event.nbytes()) == result_bytes:
                results += 1 if event.nbytes() > 0 else -1
            peak = max(peak, held - (result_bytes if results > 0 else 0))
    return peak
