"""The guard with shells instead of servers."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_vespo import guard


def start(command: list[str], grace: float = 0.5) -> subprocess.Popen[bytes]:
    return subprocess.Popen(guard.guarded(command, grace))


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + 10
    while not (file.is_file() and file.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return file.read_text().strip()


def runs(pid: str | int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_exit_status_is_the_commands() -> None:
    assert start(["sh", "-c", "exit 7"]).wait(10) == 7
    assert start(["sh", "-c", "kill -9 $$"]).wait(10) == 137
    assert start(["/no/such/program"]).wait(10) == 127


def test_stop_kills_what_ignores_it_and_what_left_the_session(tmp_path: Path) -> None:
    script = f"trap '' TERM; setsid sh -c 'echo $$ > {tmp_path}/grandchild; sleep 60' & while true; do sleep 1; done"
    process = start(["sh", "-c", script])
    grandchild = wait_for(tmp_path / "grandchild")
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert not runs(grandchild)


def test_a_crash_takes_the_children_along(tmp_path: Path) -> None:
    process = start(["sh", "-c", f"sleep 60 & echo $! > {tmp_path}/child; exit 3"])
    assert process.wait(10) == 3
    assert not runs(wait_for(tmp_path / "child"))


def test_the_death_of_the_starting_thread_is_not_the_owners(tmp_path: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    thread = threading.Thread(target=lambda: started.append(start(["sleep", "60"])))
    thread.start()
    # The signal is armed only once the guard runs: let the thread end after that.
    thread.join()
    time.sleep(0.5)
    assert started[0].poll() is None
    started[0].terminate()
    assert started[0].wait(10) == 143


def test_the_command_dies_with_a_killed_guard_and_a_killed_owner(tmp_path: Path) -> None:
    process = start(["sh", "-c", f"echo $$ > {tmp_path}/child; exec sleep 60"])
    child = wait_for(tmp_path / "child")
    process.kill()
    process.wait()
    time.sleep(0.2)
    assert not runs(child)

    owner = (
        "import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-I', '-S', sys.argv[1], "
        "str(os.getpid()), '0.5', 'sh', '-c', sys.argv[2]]); time.sleep(60)"
    )
    script = f"echo $$ > {tmp_path}/second; exec sleep 60"
    with subprocess.Popen([sys.executable, "-c", owner, guard.__file__, script]) as process:
        child = wait_for(tmp_path / "second")
        process.kill()
    time.sleep(0.5)
    assert not runs(child)
