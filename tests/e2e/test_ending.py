"""How runs end: asked to, or by the death of a rank. Real launchers, real ranks, real signals.

The processes are forked from this one (``tests.forked``): the imports of three are most of what a job costs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_launch import assert_no_process_mentions, make_config
from tests.forked import popen

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("stopping_worker.py")

LAUNCHER = """
import sys
from megatron_vespo import launch
from megatron_vespo.stopping import StopRequest
stop = StopRequest(launch.pass_on)
stop.install()
print("failure:", launch.launch_ranks(2, sys.argv[1:], stop=stop), flush=True)
"""


def wait_until(process: subprocess.Popen[str], happened: Callable[[], object]) -> None:
    """Wait for what the process is about to do."""
    deadline = time.monotonic() + 120
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate())
        time.sleep(0.05)


@contextmanager
def job(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    pipe, env = subprocess.PIPE, os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *command]
    with popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def stepping(folder: Path, seconds: float, *arguments: str, torchrun: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose two ranks are stepping."""
    worker = [str(WORKER), str(folder), str(seconds), *arguments]
    command = ["-c", LAUNCHER, *worker]
    if torchrun:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *worker]
    with job(command) as process:
        wait_until(process, lambda: len(list(folder.glob("pid_*"))) == 2)
        yield process


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("saved_*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_alone_saves_and_leaves(tmp_path: Path, number: signal.Signals) -> None:
    with stepping(tmp_path, 1.0) as process:
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "failure: None\n"), error
    assert saved(tmp_path) == ["saved_0", "saved_1"]
    assert error.count("stopping after this step; a second signal ends at once") == 1
    assert_no_process_mentions(str(tmp_path))


def test_slurm_signals_every_process(tmp_path: Path) -> None:
    with stepping(tmp_path, 1.0) as process:
        for one in [*psutil.Process(process.pid).children(), process]:
            one.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert saved(tmp_path) == ["saved_0", "saved_1"]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with stepping(tmp_path, 300.0) as process:
        process.terminate()
        time.sleep(1.5)
        assert process.poll() is None
        began = time.monotonic()
        process.terminate()
        process.communicate(timeout=60)
        assert time.monotonic() - began < 15
    assert process.returncode == 128 + signal.SIGTERM
    assert saved(tmp_path) == []
    assert_no_process_mentions(str(tmp_path))


def test_a_request_to_torchrun_is_one_to_the_ranks(tmp_path: Path) -> None:
    with stepping(tmp_path, 0.5, torchrun=True) as process:
        process.terminate()
        process.communicate(timeout=60)
    assert saved(tmp_path) == ["saved_0", "saved_1"]


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_dead_rank_ends_the_others_although_they_defer_signals(tmp_path: Path, torchrun: bool) -> None:
    with stepping(tmp_path, 300.0, torchrun=torchrun) as process:
        began = time.monotonic()
        os.kill(int((tmp_path / "pid_1").read_text()), signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
        assert time.monotonic() - began < 15
    if not torchrun:
        assert out == f"failure: RankFailure(rank=1, status={-signal.SIGKILL})\n"
    assert saved(tmp_path) == []
    assert_no_process_mentions(str(tmp_path))


def test_a_stopped_process_ends_the_job_also_if_it_is_rank_0(tmp_path: Path) -> None:
    with stepping(tmp_path, 0.1, "freeze") as process:
        began = time.monotonic()
        out, error = process.communicate(timeout=60)
        assert time.monotonic() - began < 2 + 20
    assert out == f"failure: RankFailure(rank=0, status={-signal.SIGKILL})\n"  # the watchdog of rank 1 killed it
    assert "the others wait for rank 0: no answer" in error and "rank 1: in 'ask' for" in error, error
    assert_no_process_mentions(str(tmp_path))


def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    config = make_sft_config(tmp_path)
    with job(["-m", "megatron_vespo.launch", "--ranks", "2", str(config)]) as process:
        wait_for_steps(process, tmp_path)
        process.kill()
        process.wait()
    assert_no_process_mentions(str(tmp_path))


def make_sft_config(folder: Path) -> Path:
    """A supervised run of more steps than any test waits for."""
    sections = {"objective": "sft", "training": {"steps": 100_000, "samples_per_step": 2}}
    config = make_config(folder, **sections)  # type: ignore[arg-type]
    (folder / "data.jsonl").write_text(json.dumps({"prompt": "1 2", "response": "3"}) + "\n")
    return config


def wait_for_steps(process: subprocess.Popen[str], folder: Path) -> None:
    metrics = folder / "runs" / "run" / "metrics.jsonl"
    wait_until(process, lambda: metrics.exists() and metrics.stat().st_size)


def rank_process(launcher: int, rank: int) -> psutil.Process:
    """The launcher's children are its ranks, which it starts in their order."""
    return sorted(psutil.Process(launcher).children(), key=lambda p: (p.create_time(), p.pid))[rank]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_rank_is_named_with_its_log(tmp_path: Path, number: signal.Signals) -> None:
    config = make_sft_config(tmp_path)
    with job(["-m", "megatron_vespo.launch", "--ranks", "2", str(config)]) as process:
        wait_for_steps(process, tmp_path)
        began = time.monotonic()
        rank_process(process.pid, 1).send_signal(number)
        _, error = process.communicate(timeout=60)
        assert time.monotonic() - began < 30
    logs = tmp_path / "runs" / "run" / "logs"
    assert process.returncode == 128 + number
    assert f"error: rank 1 was killed by {number.name}" in error and str(logs / "rank_1.log") in error, error
    assert "Traceback" not in error  # of the other, which lost its connection; its log has it
    assert (logs / "error.txt").read_text().startswith(f"launcher: rank 1 was killed by {number.name}")
    if number == signal.SIGSEGV:
        assert "Fatal Python error: Segmentation fault" in (logs / "rank_1.log").read_text()
    else:
        assert "out of memory" in error
    assert_no_process_mentions(str(tmp_path))


def test_a_second_run_of_the_name_is_refused_at_once(tmp_path: Path) -> None:
    config = make_sft_config(tmp_path)
    command = ["-m", "megatron_vespo.launch", str(config), "run.overwrite=true"]
    with job(command) as process:
        wait_for_steps(process, tmp_path)
        holder = rank_process(process.pid, 0).pid
        with job(command) as second:
            _, error = second.communicate(timeout=60)
        assert second.returncode == 1 and len(error.splitlines()) == 1  # no rank was started
        assert error.startswith("error: ") and f"process {holder})" in error, error
        assert process.poll() is None
        process.terminate()
        process.communicate(timeout=60)


def test_a_traceback_goes_to_the_log_and_once_to_the_console(tmp_path: Path) -> None:
    config = make_sft_config(tmp_path)
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, sys\n"
        "from megatron_vespo import loop, train\n"
        "def fail(*args):\n"
        "    assert os.environ['RANK'] != '1', 'a bug of ours'\n"
        "    return update(*args)\n"
        "update, loop._update = loop._update, fail\n"
        f"sys.exit(train.main([{str(config)!r}]))\n"
    )
    with job(["-c", LAUNCHER, str(rank)]) as process:
        out, error = process.communicate(timeout=120)
    logs = tmp_path / "runs" / "run" / "logs"
    assert out.endswith("status=1)\n")
    assert error.count("Traceback") == 1 and "AssertionError: a bug of ours" in error, error
    assert f"rank 1 failed; its log: {logs / 'rank_1.log'}" in error
    assert "AssertionError: a bug of ours" in (logs / "rank_1.log").read_text()
    assert (logs / "error.txt").read_text().startswith("rank 1: ")
    assert_no_process_mentions(str(tmp_path))
