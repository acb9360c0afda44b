"""What a person sees while a run goes on."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

# The header is repeated after this many lines, so that it is always on the screen.
HEADER_EVERY = 20
# Steps whose mean duration gives the ETA.
ETA_WINDOW = 20


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the step lines: title, width and how a step's metrics become its text."""

    title: str
    width: int
    text: Callable[[Mapping[str, float | None]], str]


def _value(name: str, format_spec: str) -> Callable[[Mapping[str, float | None]], str]:
    """Text of one metric; ``-`` where it was not measured."""

    def text(metrics: Mapping[str, float | None]) -> str:
        value = metrics.get(name)
        return "-" if value is None else format(value, format_spec)

    return text


def _time_split(metrics: Mapping[str, float | None]) -> str:
    """Seconds of the three phases that matter most."""
    parts = (metrics.get(f"perf/{phase}_time") for phase in ("generate", "train", "sync"))
    return "/".join("-" if part is None else f"{part:.3g}" for part in parts)


RL_COLUMNS = (
    Column("reward", 7, _value("rollout/reward_mean", ".3f")),
    Column("|log W|", 8, _value("vespo/log_w_abs_mean", ".3g")),
    Column("phi", 6, _value("vespo/phi_mean", ".3f")),
    Column("ESS_W", 6, _value("vespo/ess_w", ".3f")),
    Column("ESS_phi", 7, _value("vespo/ess_phi", ".3f")),
    Column("grad", 8, _value("train/grad_norm", ".3g")),
    Column("tok/s", 8, _value("perf/tokens_per_second", ",.0f")),
    Column("gen/train/sync s", 17, _time_split),
)
ROLLOUT_COLUMNS = (
    Column("reward", 7, _value("rollout/reward_mean", ".3f")),
    Column("std", 6, _value("rollout/reward_std", ".3f")),
    Column("length", 8, _value("rollout/response_length_mean", ",.1f")),
    Column("longest", 8, _value("rollout/response_length_max", ",.0f")),
    Column("cut", 6, _value("rollout/truncated_share", ".3f")),
    Column("equal", 6, _value("rollout/equal_reward_share", ".3f")),
    Column("gen s", 8, _value("perf/generate_time", ".3g")),
)
SFT_COLUMNS = (
    Column("loss", 8, _value("train/loss", ".4f")),
    Column("accuracy", 8, _value("train/accuracy", ".3f")),
    Column("grad", 8, _value("train/grad_norm", ".3g")),
    Column("tok/s", 10, _value("perf/tokens_per_second", ",.0f")),
)


class Console:
    """Prints phases and one aligned line a step; on a terminal a progress bar stays below them.

    Args:
        total_steps: Steps of the whole run.
        columns: ``RL_COLUMNS``, ``ROLLOUT_COLUMNS`` or ``SFT_COLUMNS``.
        stream: Where to print.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        columns: tuple[Column, ...] = RL_COLUMNS,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._columns = columns
        self._stream = stream if stream is not None else sys.stdout
        self._clock = clock
        self._durations: deque[float] = deque(maxlen=ETA_WINDOW)
        self._last_step_at = clock()
        self._lines = 0
        self._progress = _progress_bar(self._stream) if self._stream.isatty() else None
        self._bar = self._progress.add_task("", total=total_steps, eta="") if self._progress else None

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self._progress is not None:
            self._progress.console.print(
                text, markup=False, highlight=False, no_wrap=True, overflow="ignore", crop=False
            )
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce something slow and say how long it took: ``starting SGLang ...``, ``... ready in 21 s``."""
        self.message(f"{name} ...")
        start = self._clock()
        try:
            yield
        except BaseException:
            self.message(f"{name}: failed after {format_seconds(self._clock() - start)}")
            raise
        self.message(f"{name}: ready in {format_seconds(self._clock() - start)}")
        self._last_step_at = self._clock()

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Print the line of a finished step, numbered from 1.

        Args:
            step: Steps finished, this one included.
            metrics: The step's metrics; the ETA uses ``perf/step_time`` where it is given, the clock otherwise.
        """
        now = self._clock()
        measured = metrics.get("perf/step_time")
        self._durations.append(measured if measured is not None else now - self._last_step_at)
        self._last_step_at = now
        eta = format_seconds(sum(self._durations) / len(self._durations) * max(0, self._total_steps - step))

        if self._lines % HEADER_EVERY == 0:
            self.message(self._row("step", [column.title for column in self._columns], "ETA"))
        self._lines += 1
        self.message(self._row(f"{step}/{self._total_steps}", [column.text(metrics) for column in self._columns], eta))
        if self._progress is not None and self._bar is not None:
            self._progress.start()
            self._progress.update(self._bar, completed=step, eta=f"ETA {eta}")

    def close(self) -> None:
        """Take the progress bar away. Needed before anything else prints, also after an error."""
        if self._progress is not None:
            self._progress.stop()

    def _row(self, step: str, cells: list[str], eta: str) -> str:
        width = 2 * len(str(self._total_steps)) + 1
        texts = [cell.rjust(column.width) for cell, column in zip(cells, self._columns, strict=True)]
        return "  ".join([step.rjust(max(width, 4)), *texts, eta.rjust(9)])


def _progress_bar(stream: TextIO) -> Progress:
    return Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[eta]}"),
        console=RichConsole(file=stream),
        transient=True,
        expand=True,
    )


def format_seconds(seconds: float) -> str:
    """A duration for people: ``0.8 s``, ``21 s``, ``3 m 05 s``, ``2 h 07 m``."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"
