"""Where a step's wall-clock time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Timers:
    """Named wall-clock timers: ``with timers("generate"): ...``.

    Timers may nest. Time inside an inner timer belongs to the inner one alone, so the phases never count a second
    twice and add up to the time spent under any timer. On a GPU the time is what the host waited: work still queued
    when a phase ends is counted in the next phase that synchronises. Not thread-safe: one object a thread.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body under ``name``, also when it raises."""
        self._charge()
        self._seconds.setdefault(name, 0.0)
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last reset, in order of first use; running phases up to now."""
        self._charge()
        return dict(self._seconds)

    def reset(self) -> None:
        """Start again from zero, usually at the start of a step; running phases go on from now."""
        self._charge()
        self._seconds = {name: 0.0 for name in self._running}

    def _charge(self) -> None:
        """Book the time since the last change to the innermost running phase."""
        now = self._clock()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now
