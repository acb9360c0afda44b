import numpy as np
import pytest

from megatron_vespo import loop
from megatron_vespo.errors import UserError
from megatron_vespo.loop import _update
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.policy.policy import StepResult
from megatron_vespo.schedule import Schedule
from megatron_vespo.types import Progress, Prompt, Sample


def make_sample(version: int) -> Sample:
    ids = np.array([1, 2], np.int32)
    versions = np.array([version, version + 1], np.int32)
    return Sample(Prompt(7, ids), 0, ids, np.zeros(2, np.float32), versions, "stop")


def make_schedule(bound: int | None) -> Schedule:
    return Schedule(10, 2, 64, 1, float, max_skipped_updates=2, staleness_bound=bound)


def test_a_sample_beyond_the_staleness_bound_is_a_mistake() -> None:
    make_schedule(3).check_staleness([make_sample(5)], policy_version=8)
    with pytest.raises(RuntimeError, match=r"sample 7/0 is 4 updates old, more than .* = 3"):
        make_schedule(3).check_staleness([make_sample(5), make_sample(4)], policy_version=8)
    make_schedule(None).check_staleness([make_sample(0)], policy_version=1000)


class Skipping:
    """A policy whose gradients are as told."""

    def __init__(self, *skips: bool) -> None:
        self.skips = list(skips)

    def forward_backward(self, *args: object) -> dict[str, np.ndarray]:
        return {}

    def optim_step(self) -> StepResult:
        skipped = self.skips.pop(0)
        return StepResult(float("nan") if skipped else 1.0, 1e-3, {}, skipped=skipped)


def updates(monkeypatch: pytest.MonkeyPatch, *skips: bool) -> tuple[Progress, StepMetrics]:
    monkeypatch.setattr(loop.parallel, "data_parallel_size", lambda: 1)
    monkeypatch.setattr(loop.parallel, "data_parallel_rank", lambda: 0)
    policy, progress, metrics = Skipping(*skips), Progress(), StepMetrics()
    for _ in skips:
        _update(policy, [make_sample(0)], None, make_schedule(None), metrics, progress)  # type: ignore[arg-type]
    return progress, metrics


def test_skipped_updates_are_counted_and_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    progress, metrics = updates(monkeypatch, True, True, False, True)
    assert progress.policy_version == 4 and progress.skipped_in_a_row == 1
    assert metrics.result()["train/skipped_updates"] == 3


def test_too_many_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"gradient norm is nan, and 3 updates in a row were skipped .*--resume STEP"):
        updates(monkeypatch, False, True, True, True)
