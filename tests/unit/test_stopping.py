"""Real signals to real processes: what is a request, and what ends a process."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POLITE = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]

# Leaves by the request alone; what is open is closed however it leaves.
PROGRAM = """
import sys, time
from contextlib import ExitStack
from megatron_vespo.stopping import StopRequest, announce_stop
stop = StopRequest(announce_stop)
stop.install()
with ExitStack() as stack:
    stack.callback(print, "closed", flush=True)
    if "defer" in sys.argv:
        stop.defer()
    print("started", flush=True)
    deadline = time.monotonic() + 60
    while not (stop.requested and "stubborn" not in sys.argv) and time.monotonic() < deadline:
        time.sleep(0.01)
    if "slow" in sys.argv:
        time.sleep(2)  # the ranks of a job finish their step together: none has left before all were asked
    print("saved", flush=True)
"""


@pytest.fixture(autouse=True)
def hangups_are_not_ignored() -> Iterator[None]:
    """They are where the tests themselves run under nohup, and processes inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "started\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", POLITE)
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    with running("defer") as process:
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "saved\nclosed\n")
    assert error == "stopping after this step; a second signal ends at once\n"


@pytest.mark.parametrize("number", POLITE)
def test_there_is_nothing_to_finish_before_the_first_step(number: signal.Signals) -> None:
    with running() as process:
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + number, "closed\n")


def test_a_second_signal_ends_at_once_but_an_echo_of_the_first_does_not() -> None:
    with running("defer", "stubborn") as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.9)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (128 + signal.SIGINT, "closed\n")


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running("defer") as process:
            process.send_signal(signal.SIGHUP)
            time.sleep(0.3)
            assert process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


AGENT = """
import os, subprocess, sys, time
os.environ |= {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}
command = [sys.executable, "-c", sys.argv[1], "defer", "slow"]
ranks = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
other = subprocess.Popen(["sleep", "60"])  # an agent may have other children
for rank in ranks:
    rank.stdout.readline()
if sys.argv[2] == "one dies":
    ranks[1].kill()
    if len(sys.argv) > 3:
        ranks[1].wait()
    time.sleep(0.2)
for rank in ranks:
    rank.terminate()
print([rank.wait() for rank in ranks], flush=True)
other.kill()
"""


@pytest.mark.parametrize(
    "arguments, statuses",
    [(["all live"], "[0, 0]"), (["one dies"], "[143, -9]"), (["one dies", "and is waited for"], "[143, -9]")],
)
def test_the_agents_sigterm_after_a_ranks_death_is_no_request(arguments: list[str], statuses: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", AGENT, PROGRAM, *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert result.stdout.strip() == statuses, result.stderr


FORK = """
import os, time
from megatron_vespo.stopping import StopRequest
stop = StopRequest()
stop.install()
stop.defer()
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    os.write(tell, b".")  # a signal before the fork is complete would be lost
    time.sleep(60)
    os._exit(0)
os.read(ready, 1)
while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
    os.kill(child, 15)  # again, as one that comes while the child is about to sleep waits until it wakes up
    time.sleep(0.2)
print(os.waitstatus_to_exitcode(ended[1]), stop.requested)
"""


def test_a_forked_child_is_ended_by_sigterm() -> None:
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert result.stdout == "143 False\n"
