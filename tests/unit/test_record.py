import io
from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.metrics.console import ROLLOUT_COLUMNS, Console
from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.metrics.sinks import JsonlSink
from megatron_vespo.record import Recorder
from megatron_vespo.rollout.batches import BatchSink


def make_recorder(folder: Path, stream: io.StringIO) -> Recorder:
    console = Console(2, ROLLOUT_COLUMNS, stream)
    sinks = [JsonlSink(folder / "metrics.jsonl")]
    return Recorder(2, console, sinks, None, folder, {}, batch_sink=BatchSink(folder / "rollouts", 1.0, 64))


def step_metrics(**values: float) -> StepMetrics:
    metrics = StepMetrics()
    metrics.update({name.replace("__", "/"): value for name, value in values.items()})
    return metrics


def test_batches_go_where_the_run_keeps_them(tmp_path: Path) -> None:
    make_recorder(tmp_path, io.StringIO()).record_batch(2, [], 4)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["batch_000002.msgpack"]


def test_a_recorder_of_another_rank_writes_and_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(2, None, (), None, tmp_path, {})
    recorder.message("hello")
    recorder.record_batch(1, [], 0)
    recorder.record_step(1, step_metrics(train__tokens=5))
    recorder.finish()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "accuracies, shown", [([0.25], "held: 0.250\n"), ([0.25, 0.5, 0.75], "held: 0.250 before, 0.750 after\n")]
)
def test_the_accuracy_at_the_end(tmp_path: Path, accuracies: list[float], shown: str) -> None:
    stream = io.StringIO()
    recorder = make_recorder(tmp_path, stream)
    recorder.record_start({"eval/held/accuracy": accuracies[0]})
    for step, accuracy in enumerate(accuracies[1:], start=1):
        recorder.record_step(step, step_metrics(eval__held__accuracy=accuracy))
    recorder.finish()
    assert f"held-out accuracy of {shown}" in stream.getvalue()


def test_only_tokens_trained_on_make_a_speed(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path, io.StringIO())
    values: list[dict[str, Any]] = [{"rollout__reward_mean": 1.0}, {"train__tokens": 100}]
    for step, metrics in enumerate(values, start=1):
        recorder.record_step(step, step_metrics(**metrics))
    recorder.finish()
    rows = read_metrics(tmp_path / "metrics.jsonl").values
    assert "perf/tokens_per_second" not in rows[0] and rows[1]["perf/tokens_per_second"] > 0


def test_the_line_of_a_step_without_a_trainer(tmp_path: Path) -> None:
    stream = io.StringIO()
    lengths = {"rollout__response_length_mean": 1234.56, "rollout__response_length_max": 4096}
    make_recorder(tmp_path, stream).record_step(1, step_metrics(rollout__reward_mean=0.5, **lengths))
    header, line = stream.getvalue().splitlines()
    assert header.split()[:2] == ["step", "reward"]
    assert line.split()[:2] == ["1/2", "0.500"] and "1,234.6" in line and "4,096" in line
