"""A forked program cannot be told from one that Python started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.forked import popen

SHOW = """
import os, signal, sys
from pathlib import Path
print(sys.argv, __name__, Path.cwd().name, os.environ.get("A"), os.environ.get("HOME"), os.getsid(0) == os.getpid())
print([signal.getsignal(n) for n in (1, 2, 13, 15)], len(os.listdir("/proc/self/fd")), file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("file", [False, True])
def test_it_has_its_arguments_environment_folder_session_files_and_signals(
    tmp_path: Path, file: bool, status: int
) -> None:
    (tmp_path / "show.py").write_text(SHOW)
    command = [sys.executable, *([str(tmp_path / "show.py")] if file else ["-c", SHOW]), str(status)]
    seen = []
    for start in (popen, subprocess.Popen):
        pipe = subprocess.PIPE
        with start(  # type: ignore[operator]
            command, env={"A": "b"}, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path, start_new_session=True
        ) as process:
            seen.append((*process.communicate(), process.returncode))
    assert seen[0] == seen[1] and seen[0][2] == status


def test_a_module_runs_as_main() -> None:
    with popen([sys.executable, "-m", "json.tool", "--help"], stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate()
    assert process.returncode == 0 and "json" in out


def test_an_error_is_a_traceback_and_status_1() -> None:
    with popen([sys.executable, "-c", "1 / 0"], stderr=subprocess.PIPE, text=True) as process:
        _, error = process.communicate()
    assert process.returncode == 1 and error.endswith("ZeroDivisionError: division by zero\n")


def test_its_command_line_is_its_own_and_a_signal_ends_it() -> None:
    code = "import time; print(flush=True); time.sleep(600)"
    with popen([sys.executable, "-c", code, "found"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        lines = [" ".join(psutil.Process(pid).cmdline()) for pid in (process.pid, os.getpid())]
        process.terminate()
    assert ["found" in line for line in lines] == [True, False]
    assert process.returncode == -signal.SIGTERM
