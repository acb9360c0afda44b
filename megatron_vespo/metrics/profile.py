"""A window of steps under a profiler, with the loop's phases by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_vespo.errors import UserError


@dataclass(frozen=True, slots=True)
class Window:
    """What is profiled.

    Attributes:
        first: First step, from 1.
        last: Last step.
        shapes: Record shapes of operators' inputs.
        stacks: Record Python stacks.
        memory: Record allocations.
    """

    first: int
    last: int
    shapes: bool = False
    stacks: bool = False
    memory: bool = False


class NoProfiler:
    """On ranks that are not profiled, and in most runs."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Nothing."""
        return nullcontext()

    def step_done(self, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class TraceProfiler(NoProfiler):
    """``torch.profiler``: a Chrome trace of the window, for chrome://tracing or Perfetto.

    Args:
        window: What is profiled.
        file: Where the trace goes, ``.json`` or ``.json.gz``; its folder is made.
        announce: Told where it is.
    """

    def __init__(self, window: Window, file: Path, announce: Callable[[str], None] = lambda text: None) -> None:
        self._window, self._file, self._announce = window, file, announce
        self._profile: profile | None = None

    def phase(self, name: str) -> AbstractContextManager[object]:
        """A named range in the trace."""
        return record_function(name) if self._profile is not None else nullcontext()

    def step_done(self, step: int) -> None:
        """A step ended, 0 for what comes before the first: begin or end."""
        if self._profile is not None and step >= self._window.last:
            self.close()
        if self._profile is None and step + 1 == self._window.first:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities,
                record_shapes=self._window.shapes,
                with_stack=self._window.stacks,
                profile_memory=self._window.memory,
            )
            self._profile.start()

    def close(self) -> None:
        """Write the trace, if there is one: a run may end within the window."""
        if self._profile is None:
            return
        self._profile.stop()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._file))
        self._profile = None
        self._announce(f"profile: {self._file}")


class RangeProfiler(NoProfiler):
    """For ``nsys profile --capture-range=cudaProfilerApi``: starts and stops CUDA's profiler, with NVTX ranges.

    Args:
        window: What is profiled.
        model_ranges: Turns the trainer's own ranges on and off.

    Raises:
        UserError: There is no GPU.
    """

    def __init__(self, window: Window, model_ranges: Callable[[bool], None] = lambda on: None) -> None:
        if not torch.cuda.is_available():
            raise UserError("profile.tool: nsys profiles a GPU, and there is none; use tool: torch")
        self._window, self._model_ranges, self._on = window, model_ranges, False

    def phase(self, name: str) -> AbstractContextManager[object]:
        """An NVTX range."""
        return self._range(name) if self._on else nullcontext()

    @contextmanager
    def _range(self, name: str) -> Iterator[None]:
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()

    def step_done(self, step: int) -> None:
        """A step ended, 0 for what comes before the first: begin or end."""
        if self._on and step >= self._window.last:
            self.close()
        if not self._on and step + 1 == self._window.first:
            self._model_ranges(True)
            torch.cuda.profiler.start()
            self._on = True

    def close(self) -> None:
        """End the window."""
        if self._on:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            self._model_ranges(False)
            self._on = False
