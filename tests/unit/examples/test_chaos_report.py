"""The chaos report counts what a run left behind."""

import json
from pathlib import Path

import numpy as np

from examples.chaos_cpu.report import Fault, account_of, failures_of, write_up
from megatron_vespo.rollout.batches import BatchSink
from megatron_vespo.rollout.buffer import Entry
from megatron_vespo.rollout.state import Held, RolloutState, encode_state
from megatron_vespo.types import Prompt, Sample, SampleGroup


def make_group(index: int, error: str = "") -> SampleGroup:
    prompt, ids = Prompt(index, np.array([1], np.int32)), np.array([2], np.int32)
    return SampleGroup(prompt, [Sample(prompt, 0, ids, np.zeros(1, np.float32), ids, "stop", reward_error=error)])


def leave_run(run: Path, trained: list[list[int]], waiting: list[int], position: int) -> None:
    """What a run leaves that trained on these prompts, batch by batch."""
    sink = BatchSink(run / "rollouts", 1.0, 64)
    for step, indices in enumerate(trained, start=1):
        sink.write(step, [make_group(index, "it hangs" if index == 1 else "") for index in indices], 4 * (step - 1))
    checkpoint = run / "checkpoints" / f"iter_{len(trained):07d}"
    (checkpoint / "run").mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    held = [Held(Entry(make_group(index).prompt, 0)) for index in waiting]
    (checkpoint / "run" / "data.msgpack").write_bytes(encode_state(RolloutState({"position": position}, held), {}))
    lines = [{"step": 0, "eval/heldout/accuracy": 0.5}]
    lines += [{"step": step, "rollout/staleness_max": 7, "perf/server_losses": 1} for step in (1, 2)]
    lines[-1] |= {"eval/heldout/accuracy": 0.9}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_that_lost_nothing(tmp_path: Path) -> None:
    leave_run(tmp_path, [[0, 1], [2, 3]], waiting=[4, 5], position=6)
    account = account_of(tmp_path)
    assert (account.submitted, account.trained, account.waiting) == (6, 4, 2)
    assert (account.lost, account.duplicated, account.unscored) == (0, 0, 1)
    assert (account.steps, account.staleness, account.losses, account.accuracy) == (2, 7, 2, (0.5, 0.9))
    assert failures_of(account, steps=2, staleness_bound=7, goal=0.9, unscored=1) == []
    report = write_up([Fault("server killed", 1, "started again", 9.6)], account, 61.0, [])
    assert "| server killed | 1 | started again | 10 s |" in report and "Nothing was lost." in report


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    leave_run(tmp_path, [[0, 1], [1, 2]], waiting=[2, 5], position=6)
    account = account_of(tmp_path)
    assert account.lost == 2 and account.duplicated == 2  # 3 and 4 are gone; 1 was trained on twice, 2 still waits
    failures = failures_of(account, steps=3, staleness_bound=6, goal=0.95, unscored=5)
    assert len(failures) == 6
    assert "FAILED: 2 prompts were lost" in write_up([], account, 1.0, failures)


def test_a_run_that_did_not_end_has_a_report_too() -> None:
    report = write_up([Fault("server killed", 1, "started again", 9.6)], None, 61.0, ["the run ended"])
    assert "started again" in report and "61 s" in report and "FAILED: the run ended" in report
