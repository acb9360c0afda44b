import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_vespo.config_file import parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.estimate.devices import peak_tflops
from megatron_vespo.metrics.profile import NoProfiler, TraceProfiler, Window
from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.metrics.sinks import JsonlSink
from megatron_vespo.record import Hardware, Recorder
from megatron_vespo.recorders import make_profiler


def names(trace: Path) -> list[str]:
    with gzip.open(trace, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]


def run(folder: Path, profiler: NoProfiler, steps: int, resumed_after: int = 0) -> None:
    """Steps of a recorder, each with phases whose names tell the step."""
    recorder = Recorder(steps, None, (), None, folder, {}, profiler=profiler, resumed_after=resumed_after)
    recorder.record_start({})
    for step in range(resumed_after + 1, steps + 1):
        for phase in ("generate", "train"):
            with recorder.timed(phase):
                torch.ones(2) @ torch.ones(2)
        with torch.profiler.record_function(f"step {step}"):
            pass
        recorder.record_step(step, StepMetrics())
    recorder.finish()


def test_the_trace_holds_the_phases_of_its_steps_and_no_others(tmp_path: Path) -> None:
    trace = tmp_path / "profile" / "t.json.gz"
    run(tmp_path, TraceProfiler(Window(2, 3), trace), 5)
    found = names(trace)
    assert [name for name in found if name.startswith("step")] == ["step 2", "step 3"]
    assert found.count("generate") == found.count("train") == 2
    with gzip.open(trace, "rt") as file:
        assert "aten::dot" in file.read()


@pytest.mark.parametrize(
    "window, steps, resumed_after, wanted",
    [
        (Window(1, 1), 3, 0, ["step 1"]),
        (Window(3, 9), 4, 0, ["step 3", "step 4"]),  # the run ends within it
        (Window(3, 3), 4, 2, ["step 3"]),
        (Window(2, 3), 5, 2, None),  # the run goes on after its beginning
        (Window(7, 8), 4, 0, None),
    ],
)
def test_where_windows_begin_and_end(
    tmp_path: Path, window: Window, steps: int, resumed_after: int, wanted: list[str] | None
) -> None:
    trace = tmp_path / "t.json.gz"
    run(tmp_path, TraceProfiler(window, trace), steps, resumed_after)
    assert trace.exists() == (wanted is not None)
    if wanted is not None:
        assert [name for name in names(trace) if name.startswith("step")] == wanted


def config(**profile: object) -> dict[str, object]:
    tree: dict[str, object] = {"run": {"name": "x"}, "model": {"hf_path": "m"}, "training": {"steps": 1}}
    return tree | {"data": {"train": "t"}, "profile": profile}


def test_ranks_and_tools() -> None:
    chosen = parse_config(config(steps=[3, 4], ranks=[1]))
    assert type(make_profiler(chosen, 0)) is NoProfiler
    assert isinstance(make_profiler(chosen, 1), TraceProfiler)
    assert type(make_profiler(parse_config(config()), 0)) is NoProfiler
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"profile\.tool: nsys"):
            make_profiler(parse_config(config(steps=[1, 1], tool="nsys")), 0)


@pytest.mark.parametrize("steps", [[2, 1], [1], [1, 2, 3], [0, 1]])
def test_wrong_windows(steps: list[int]) -> None:
    with pytest.raises(UserError, match=r"profile"):
        parse_config(config(steps=steps))


def test_speeds_and_the_time_that_no_phase_has(tmp_path: Path) -> None:
    hardware = Hardware(4, 0.5, lambda: {"perf/gpu_memory_allocated_max": 7.0})
    recorder = Recorder(1, None, [JsonlSink(tmp_path / "metrics.jsonl")], None, tmp_path, {}, hardware=hardware)
    recorder.record_start({})
    with recorder.timed("train"):
        pass
    metrics = StepMetrics()
    metrics.update({"train/tokens": 300, "rollout/response_tokens": 100, "perf/train_flops": 2e12})
    recorder.record_step(1, metrics)
    (row,) = read_metrics(tmp_path / "metrics.jsonl").values
    assert row["perf/train_time"] + row["perf/other_time"] == pytest.approx(row["perf/step_time"])
    assert row["perf/tokens_per_second"] == pytest.approx(3 * row["perf/response_tokens_per_second"])
    assert row["perf/train_tflops_per_rank"] == pytest.approx(2 / row["perf/train_time"] / 4)
    assert row["perf/mfu"] == pytest.approx(row["perf/train_tflops_per_rank"] / 0.5)
    assert row["perf/gpu_memory_allocated_max"] == 7


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
