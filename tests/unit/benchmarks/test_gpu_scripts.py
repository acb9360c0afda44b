"""The GPU benchmarks without a GPU: every script runs on a CPU in small sizes, and the table says what went wrong."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as everything
from benchmarks.gpu import needs
from benchmarks.gpu.__main__ import Job
from benchmarks.gpu.report import Report, load, markdown, merged, text
from tests.gpu.worker import Worker
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
BENCHMARKS = ("head", "experts", "train_step", "export", "attention")


def run_all(folder: Path) -> dict[str, int]:
    """Exit status of each script."""
    statuses = {}
    for name in BENCHMARKS:
        script = importlib.import_module(f"benchmarks.gpu.{name}")
        arguments = ["--device", "cpu", "--tiny", "--out", str(folder / f"{name}.json")]
        statuses[name] = script.main(arguments)
    return statuses


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report | None]:
    folder = tmp_path_factory.mktemp("reports")
    (statuses,) = run_ranks(1, run_all, folder, initialize=False)
    found = {name: load(folder / f"{name}.json") for name in BENCHMARKS}
    assert statuses == dict.fromkeys(BENCHMARKS, 0), {
        name: report and report.failures for name, report in found.items()
    }
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_runs_and_fills_its_table(reports: dict[str, Report | None], name: str) -> None:
    report = reports[name]
    assert report is not None and not report.failures
    assert report.rows and all(len(row) == len(report.columns) for row in report.rows)
    page = markdown(report)
    assert page.count("\n|") == 2 + len(report.rows)
    times = [value for row in report.rows for column, value in zip(report.columns, row, strict=True) if column == "ms"]
    assert all(isinstance(time, float) and time > 0 for time in times)


def test_what_is_run_together_is_what_is_tried_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # scripts set it in their process, which is this one here
    modules = {job.command[1].removeprefix("benchmarks.gpu.") for job in everything.JOBS}
    assert modules == set(BENCHMARKS)
    assert len({job.name for job in everything.JOBS}) == len(everything.JOBS)
    # A hang of each in turn must leave time for the others.
    assert sum(job.seconds for job in everything.JOBS) - max(job.seconds for job in everything.JOBS) <= 600
    for job in everything.JOBS:
        script = importlib.import_module(job.command[1])
        with pytest.raises(SystemExit) as exit_:
            script.main([*job.command[2:], "--device", "cuda"])
        assert "no GPU" in str(exit_.value), "arguments do not parse"


SOUND = """
import sys
from benchmarks.gpu.report import Report
report = Report("T", ("a", "b ms"), path=sys.argv[sys.argv.index("--out") + 1])
report.add("x", 1.25)
"""
BROKEN = {
    "sound": SOUND,
    "dies": SOUND + "import os; os._exit(9)",
    "hangs": SOUND + "import time; time.sleep(60)",
    "fails in a part": SOUND
    + """
with report.attempt("half"):
    raise ValueError("too hot")
sys.exit(1)
""",
    "never begins": "raise SystemExit(3)",
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sound", None),
        ("dies", "FAILED dies: exit status 9"),
        ("hangs", "FAILED hangs: killed after 8 s"),
        ("fails in a part", "FAILED half: ValueError: too hot"),
        ("never begins", "FAILED never begins: exit status 3"),
    ],
)
def test_one_that_fails_is_named_and_the_others_run(
    name: str, said: str | None, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    jobs = [Job(name, ("-c", BROKEN[name]), 8), Job("after", ("-c", SOUND), 60)]
    status = everything.main(["--device", "cpu", "--out", str(tmp_path)], jobs)
    page = capfd.readouterr().out
    assert page.count("| x | 1.25 |") == (1 if name == "never begins" else 2), "a row that was measured is lost"
    assert status == (said is not None)
    assert said in page if said else "FAILED" not in page
    assert (tmp_path / "results.md").read_text().strip() == page.strip()


def test_time_that_is_up_leaves_the_rest_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = everything.main(["--minutes", "0", "--out", str(tmp_path)], [Job("late", ("-c", SOUND), 60)])
    assert status == 1 and "late: left out" in capsys.readouterr().out


def test_a_page_says_when_and_where() -> None:
    page = everything.header("cpu", tiny=True)
    assert "GPU benchmarks" in page and "torch 2." in page and "mean nothing" in page


@pytest.mark.parametrize(
    ("value", "shown"), [(None, ""), (1234.5, "1,234"), (0.98765, "0.988"), (12, "12"), (151936, "151,936"), ("x", "x")]
)
def test_cells(value: str | float | None, shown: str) -> None:
    assert text(value) == shown


def test_reports_of_one_title_are_one_table() -> None:
    first, second = Report("T", ("a",), rows=[["x"]]), Report("T", ("a",), rows=[["y"]], failures=["z"])
    (table,) = merged([first, second])
    assert table.rows == [["x"], ["y"]] and table.failures == ["z"]
    with pytest.raises(ValueError, match="2 cells"):
        table.add("x", "y")


def test_what_is_missing_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "NEEDED", {"numpy": "samples", "no_such_module": "a test"})
    monkeypatch.setattr(needs, "OPTIONAL", {})
    assert needs.main() == 1
    assert capsys.readouterr().err.startswith("missing: no_such_module (a test)")


def test_the_script_is_sound_and_passes_arguments_on(tmp_path: Path) -> None:
    script = ROOT / "benchmarks/gpu/run.sh"
    subprocess.run(["bash", "-n", script], check=True)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >> "$CALLS"\n')
    python.chmod(0o755)
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHON": str(python),
        "CALLS": str(tmp_path / "calls"),
        "OUT": str(tmp_path),
    }
    subprocess.run([script, "--only", "head"], env=environment, check=True, capture_output=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "-m benchmarks.gpu.needs",
        f"-W ignore -m benchmarks.gpu --out {tmp_path} --only head",
    ]


def gpu_tests(folder: Path, *options: str) -> tuple[int, str]:
    """Exit status and output of pytest, in a process that has torch and Megatron already."""
    os.chdir(ROOT)
    command = ["tests/gpu", "-p", "no:cacheprovider", "-rs", f"--basetemp={folder}", *options]
    with redirect_stdout(StringIO()) as output:
        status = pytest.main(command)
    return int(status), output.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests themselves can be run")
def test_gpu_tests_are_rehearsed_and_skipped(tmp_path: Path) -> None:
    """Everything in tests/gpu but the kernels is run, and without being asked for it is skipped with a reason."""
    ((status, skipped),) = run_ranks(1, gpu_tests, tmp_path / "skipped", initialize=False)
    assert status == 0 and "needs a GPU" in skipped and "passed" not in skipped
    ((status, rehearsed),) = run_ranks(1, gpu_tests, tmp_path / "r", "--rehearse", initialize=False, timeout=600)
    assert status == 0, rehearsed[-3000:]
    assert "passed" in rehearsed and "skipped" not in rehearsed


def test_the_worker_of_the_gpu_tests_runs_one_function_after_another_and_says_what_failed() -> None:
    worker = Worker()
    try:
        assert worker.run(os.getpid) == worker.run(os.getpid) != os.getpid()
        with pytest.raises(AssertionError, match="math domain error"):
            worker.run(math.sqrt, -1.0)
        assert worker.run(math.sqrt, 4.0) == 2
    finally:
        worker.stop()
