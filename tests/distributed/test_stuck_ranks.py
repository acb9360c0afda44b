"""Ranks that hang and ranks that are stopped, as processes of their own: the watchdog ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_vespo.rollout.server import free_port
from tests.forked import popen

TIMEOUT = 2.0

RANK = """
import os, signal, sys, time
from pathlib import Path
from megatron_vespo import parallel, watchdog

def stand_still():
    if how == "sleep":
        time.sleep(100)
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)

folder, how, culprit, timeout = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
watchdog._ANSWER_SECONDS = timeout
parallel.initialize({}, seed=1)
watcher = watchdog.Watchdog(timeout, folder)
watcher.start()
began = time.monotonic()
with watcher.at("train"):
    for turn in range(int(2 * timeout / 0.05) if how == "work" else 10**9):  # the same number on every rank
        watcher.at("update")
        if os.environ["RANK"] == culprit and turn > 10:
            stand_still()
        watcher.at("reduce")
        parallel.barrier()
        time.sleep(0.05)
watcher.stop()
print(time.monotonic() - began)
parallel.barrier()
"""


@dataclass
class Job:
    """The processes of its ranks, one of which may stand still."""

    folder: Path
    culprit: int
    processes: list[subprocess.Popen[str]]

    def end(self, dead: int | None = None) -> tuple[list[int], str, str]:
        """Statuses and what the ranks printed and told of; but for a dead one, which nobody but this ends."""
        told = [process.communicate(timeout=120) for rank, process in enumerate(self.processes) if rank != dead]
        for process in self.processes:
            process.kill()
            process.wait()
        out, error = ("".join(parts) for parts in zip(*told, strict=True))
        return [process.returncode for process in self.processes], out, error


JOBS = {  # what which rank does, of how many
    "sleep": ("sleep", 1, 3),
    "stop": ("stop", 2, 3),
    "stop rank 0": ("stop", 0, 3),
    "work": ("work", 0, 2),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """All jobs, begun at once: what they do is wait."""
    with ExitStack() as stack:
        started = {}
        for name, (how, culprit, size) in JOBS.items():
            folder, port = tmp_path_factory.mktemp("job"), str(free_port("127.0.0.1"))
            started[name] = Job(folder, culprit, [])
            for rank in range(size):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                environment = os.environ | place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                command = [sys.executable, "-c", RANK, str(folder), how, str(culprit), str(TIMEOUT)]
                pipe = subprocess.PIPE
                process = stack.enter_context(popen(command, environment, stdout=pipe, stderr=pipe, text=True))
                stack.callback(process.kill)
                started[name].processes.append(process)
        yield started


def test_a_rank_that_sleeps_is_named_with_all_stacks(jobs: dict[str, Job]) -> None:
    folder = jobs["sleep"].folder
    statuses, _, error = jobs["sleep"].end()
    assert statuses == [1, 1, 1]
    assert error.count("error: stuck: rank") == 1 and "run.stuck_timeout=2" in error, error
    assert "the others wait for rank 1: behind the others" in error
    assert "rank 1: in 'update' for" in error and "rank 2: in 'reduce' for" in error
    assert "raise run.stuck_timeout" in error and str(folder / "rank_*.log") in error
    for rank, line in enumerate(("barrier", "in stand_still", "barrier")):
        assert line in (folder / f"rank_{rank}.log").read_text()
    assert "in stand_still" not in (folder / "rank_0.log").read_text()


@pytest.mark.parametrize(
    "name, says", [("stop", "the others wait for rank 2: no answer"), ("stop rank 0", "which rank 0 keeps")]
)
def test_a_stopped_rank_is_named(jobs: dict[str, Job], name: str, says: str) -> None:
    culprit = jobs[name].culprit
    # Rank 0 holds the store here and nobody can ask whose process it is; under torchrun its launcher does.
    statuses, _, error = jobs[name].end(dead=culprit if culprit == 0 else None)
    assert error.count("error: stuck: rank") == 1 and says in error, error
    assert statuses == [-signal.SIGKILL if rank == culprit else 1 for rank in range(3)]


def test_ranks_that_go_on_are_left_alone_for_longer_than_the_timeout(jobs: dict[str, Job]) -> None:
    statuses, seconds, error = jobs["work"].end()
    assert statuses == [0, 0] and "stuck" not in error, error
    assert min(map(float, seconds.split())) > 2 * TIMEOUT
