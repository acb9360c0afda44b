"""Ranks that hang and ranks that are stopped, as processes of their own: the watchdog ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT = 3.0

RANK = """
import os, signal, sys, time
from pathlib import Path
from megatron_vespo import parallel
from megatron_vespo.watchdog import Watchdog

def stand_still():
    if how == "sleep":
        time.sleep(100)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)

folder, how, culprit, timeout = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
parallel.initialize({}, seed=1)
watchdog = Watchdog(timeout, folder)
watchdog.start()
with watchdog.at("train"):
    for turn in range(int(2 * timeout / 0.05) if how == "work" else 10**9):  # the same number on every rank
        watchdog.at("update")
        if os.environ["RANK"] == culprit and turn > 10:
            stand_still()
        watchdog.at("reduce")
        parallel.barrier()
        time.sleep(0.05)
watchdog.stop()
parallel.barrier()
"""


def run_job(folder: Path, how: str, culprit: int, size: int = 3) -> tuple[list[int], str, float]:
    """Statuses, the first rank's or whoever's error output, and seconds that the job took from the start of steps."""
    port = free_port()
    began = time.monotonic()
    with ExitStack() as stack:
        processes = []
        for rank in range(size):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            command = [sys.executable, "-c", RANK, str(folder), how, str(culprit), str(TIMEOUT)]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        errors = []
        for rank, process in enumerate(processes):
            if how == "stop" and rank == culprit == 0:
                continue
            errors.append(process.communicate(timeout=120)[1])
        seconds = time.monotonic() - began
        for process in processes:
            process.kill()
            process.wait()
        return [process.returncode for process in processes], "".join(errors), seconds


def test_a_rank_that_sleeps_is_named_with_all_stacks(tmp_path: Path) -> None:
    statuses, error, _ = run_job(tmp_path, "sleep", 1)
    assert statuses == [1, 1, 1]
    assert error.count("error: stuck: rank") == 1 and "run.stuck_timeout=3" in error, error
    assert "the others wait for rank 1: behind the others" in error
    assert "rank 1: in 'update' for" in error and "rank 2: in 'reduce' for" in error
    assert "raise run.stuck_timeout" in error and str(tmp_path / "rank_*.log") in error
    for rank, line in enumerate(("barrier", "in stand_still", "barrier")):
        assert line in (tmp_path / f"rank_{rank}.log").read_text()
    assert "in stand_still" not in (tmp_path / "rank_0.log").read_text()


@pytest.mark.parametrize("culprit, says", [(2, "the others wait for rank 2: no answer"), (0, "which rank 0 keeps")])
def test_a_stopped_rank_is_named(tmp_path: Path, culprit: int, says: str) -> None:
    statuses, error, _ = run_job(tmp_path, "stop", culprit)
    assert error.count("error: stuck: rank") == 1 and says in error, error
    # Rank 0 holds the store here and nobody can ask whose process it is; under torchrun its launcher does.
    assert statuses == [-signal.SIGKILL if rank == culprit else 1 for rank in range(3)]


def test_ranks_that_go_on_are_left_alone_for_longer_than_the_timeout(tmp_path: Path) -> None:
    statuses, error, seconds = run_job(tmp_path, "work", 0, size=2)
    assert statuses == [0, 0] and "stuck" not in error, error
    assert seconds > 2 * TIMEOUT
