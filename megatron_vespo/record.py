"""What a run leaves behind: console, metrics.jsonl, TensorBoard, rollouts, summary. Only rank 0 writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.metrics.console import Console
from megatron_vespo.metrics.measure import Values
from megatron_vespo.metrics.profile import NoProfiler
from megatron_vespo.metrics.registry import StepMetrics, phase_metrics
from megatron_vespo.metrics.report import write_report
from megatron_vespo.metrics.sinks import MetricSink, RolloutSink, SampleScores
from megatron_vespo.metrics.timers import Timers
from megatron_vespo.rollout.batches import BatchSink
from megatron_vespo.types import SampleGroup

Place = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Hardware:
    """The trainer's devices.

    Attributes:
        ranks: How many.
        peak_tflops: Dense bfloat16 peak of one, in TFLOP/s; None where it is not known.
        memory: Metrics of the memory used since it was asked last. A collective.
    """

    ranks: int = 1
    peak_tflops: float | None = None
    memory: Callable[[], Values] = dict


class Recorder:
    """Times the phases of a step and hands its metrics to every sink.

    Args:
        total_steps: Steps of the run.
        console: On rank 0; None elsewhere.
        sinks: Where metrics go; empty but on rank 0.
        rollout_sink: Where sampled texts go; None but on rank 0.
        run_folder: For the summary.
        facts: What the summary says of the run besides its metrics.
        console_interval: Steps between lines on the console.
        batch_sink: Where whole rollout batches go; None elsewhere, or if they are not kept.
        at: Says where this rank is, for whoever watches it.
        profiler: Told of phases and steps.
        hardware: What can be said of the devices.
        resumed_after: Step whose checkpoint the run goes on from.
    """

    def __init__(
        self,
        total_steps: int,
        console: Console | None,
        sinks: Sequence[MetricSink],
        rollout_sink: RolloutSink | None,
        run_folder: Path,
        facts: Mapping[str, str],
        console_interval: int = 1,
        batch_sink: BatchSink | None = None,
        at: Place = lambda place: nullcontext(),
        profiler: NoProfiler | None = None,
        hardware: Hardware | None = None,
        resumed_after: int = 0,
    ) -> None:
        self._total_steps, self._console, self._sinks = total_steps, console, sinks
        self._rollout_sink, self._run_folder, self._facts = rollout_sink, run_folder, facts
        self._console_interval, self._batch_sink, self._at = console_interval, batch_sink, at
        self._profiler, self._hardware = profiler or NoProfiler(), hardware or Hardware()
        self._resumed_after = resumed_after
        self._accuracy: dict[str, list[float]] = {}
        self._timers = Timers()
        self._step_began = time.monotonic()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time of the body as this phase of the step."""
        with self._timers(phase), self._at(phase), self._profiler.phase(phase):
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce something slow outside the steps."""
        with self._at(name):
            if self._console is None:
                yield
            else:
                with self._console.phase(name):
                    yield

    def message(self, text: str) -> None:
        """Say something on the console."""
        if self._console is not None:
            self._console.message(text)

    def record_batch(self, step: int, groups: Sequence[SampleGroup], policy_version: int) -> None:
        """Keep a rollout batch as training gets it: call this before anything in it is changed.

        Args:
            step: Number of the step that will train on it, from 1.
            groups: The batch.
            policy_version: Policy version that training on it begins with.
        """
        if self._batch_sink is not None:
            self._batch_sink.write(step, groups, policy_version)

    def record_step(
        self,
        step: int,
        metrics: StepMetrics,
        groups: Sequence[SampleGroup] = (),
        scores: Mapping[str, SampleScores] | None = None,
    ) -> None:
        """Write down a finished step, numbered from 1."""
        now = time.monotonic()
        step_time, self._step_began = now - self._step_began, now
        phases = self._timers.seconds()
        metrics.update(phase_metrics(phases))
        self._timers.reset()
        values = metrics.result()
        values["perf/step_time"] = step_time
        values["perf/other_time"] = step_time - sum(phases.values())
        values.update(_speeds(values, step_time - phases.get("evaluate", 0.0), self._hardware))
        values.update(self._hardware.memory())
        self._write(step, values)
        if self._rollout_sink is not None and groups:
            self._rollout_sink.write(step, groups, scores)
        if self._console is not None and (step % self._console_interval == 0 or step == self._total_steps):
            self._console.step(step, values)
        self._show_accuracy(step, values)
        self._profiler.step_done(step)

    def record_start(self, values: Mapping[str, float | None]) -> None:
        """Write down what was measured before the first step, as step 0."""
        if values:
            self._write(0, values)
            self._show_accuracy(0, values)
        self._profiler.step_done(self._resumed_after)
        self._timers.reset()
        self._step_began = time.monotonic()

    def finish(self) -> None:
        """Write the summary and the learning curve, say what came out, and close everything."""
        self._profiler.close()
        for sink in self._sinks:
            sink.close()
        if self._console is None:
            return
        write_report(self._run_folder, self._facts, self._total_steps)
        for name, values in self._accuracy.items():
            shown = f"{values[0]:.3f} before, {values[-1]:.3f} after" if len(values) > 1 else f"{values[0]:.3f}"
            self._console.message(f"held-out accuracy of {name}: {shown}")
        self._console.message(f"summary: {self._run_folder / 'summary.md'}")
        self._console.close()

    def _write(self, step: int, values: Mapping[str, float | None]) -> None:
        for sink in self._sinks:
            sink.write(step, values)

    def _show_accuracy(self, step: int, values: Mapping[str, float | None]) -> None:
        shown = []
        for key, value in values.items():
            if key.startswith("eval/") and key.endswith("/accuracy") and value is not None:
                name = key.removeprefix("eval/").removesuffix("/accuracy")
                self._accuracy.setdefault(name, []).append(value)
                shown.append(f"{name} {value:.3f}")
        if self._console is not None and shown:
            self._console.message(f"held-out accuracy after step {step}: {', '.join(shown)}")


def _speeds(values: Mapping[str, float | None], seconds: float, hardware: Hardware) -> Values:
    """The ``perf/...`` metrics that are something per second.

    Args:
        values: The step's other metrics.
        seconds: Time of the step without its evaluation.
        hardware: What trained.
    """
    speeds: Values = {}
    for name, count in (("tokens", "train/tokens"), ("response_tokens", "rollout/response_tokens")):
        tokens = values.get(count)
        if tokens is not None:
            speeds[f"perf/{name}_per_second"] = tokens / seconds
    flops, train_time = values.get("perf/train_flops"), values.get("perf/train_time")
    if flops is not None and train_time:
        tflops = flops / train_time / hardware.ranks / 1e12
        speeds["perf/train_tflops_per_rank"] = tflops
        if hardware.peak_tflops is not None:
            speeds["perf/mfu"] = tflops / hardware.peak_tflops
    return speeds
