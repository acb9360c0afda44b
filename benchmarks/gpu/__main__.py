"""All benchmarks, each in a process of its own; prints the tables as a page has them.

python -m benchmarks.gpu [--device cpu --tiny] [--only head ...] [--minutes 10] [--out FOLDER]

One that fails, hangs or dies is named under the table that it was filling, and the others run all the same; the exit
status is then 1. Every process prints what it does to standard error, the tables go to standard output.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.report import Report, load, markdown, merged


@dataclass(frozen=True, slots=True)
class Job:
    """A benchmark.

    Attributes:
        name: For --only and for messages.
        command: Module and arguments.
        seconds: Longest it may take.
    """

    name: str
    command: tuple[str, ...]
    seconds: float


_STEP = ("-m", "benchmarks.gpu.train_step", "--precision")
JOBS = (
    Job("head", ("-m", "benchmarks.gpu.head"), 100),
    Job("experts", ("-m", "benchmarks.gpu.experts"), 100),
    Job("step-bf16", (*_STEP, "bf16"), 110),
    Job("step-experts", (*_STEP, "experts"), 110),
    Job("step-all", (*_STEP, "all"), 110),
    Job("attention", ("-m", "benchmarks.gpu.attention"), 60),
    Job("export", ("-m", "benchmarks.gpu.export"), 80),
)
_PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core")


def main(arguments: Sequence[str] | None = None, jobs: Sequence[Job] = JOBS) -> int:
    """Run them; the exit status."""
    options = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.splitlines()[0])
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--tiny", action="store_true", help="small sizes, to try the scripts without a GPU")
    options.add_argument("--only", nargs="+", choices=[job.name for job in jobs])
    options.add_argument("--minutes", type=float, default=10, help="what has not begun by then is left out")
    options.add_argument("--out", type=Path, help="folder for the tables as JSON and as a page, results.md")
    parsed = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + 60 * parsed.minutes
        common = ["--device", parsed.device, *(["--tiny"] if parsed.tiny else [])]
        chosen = [job for job in jobs if not parsed.only or job.name in parsed.only]
        reports = [run(job, common, folder / f"{job.name}.json", deadline) for job in chosen]
        tables = merged(reports)
        page = "\n".join([header(parsed.device, parsed.tiny), *map(markdown, tables)])
        (folder / "results.md").write_text(page, encoding="utf-8")
    print(page)
    return 1 if any(table.failures for table in tables) else 0


def run(job: Job, common: Sequence[str], path: Path, deadline: float) -> Report:
    """One benchmark's report; if it did not end well, that is among its failures."""
    start = time.monotonic()
    seconds = min(job.seconds, deadline - start)
    path.unlink(missing_ok=True)
    problem = None
    if seconds <= 0:
        problem = "left out: the time for all benchmarks is up"
    else:
        print(f"== {job.name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-W", "ignore", *job.command, *common, "--out", str(path)]
        try:
            status = subprocess.run(command, timeout=seconds, stdout=sys.stderr, check=False).returncode
            problem = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            problem = f"killed after {seconds:.0f} s"
        print(f"== {job.name}: {problem or 'done'}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    report = load(path) or Report(job.name, ())
    if problem is not None and not report.failures:
        report.failures.append(f"{job.name}: {problem}")
    return report


def header(device: str, tiny: bool) -> str:
    """When, where and with what."""
    where = platform.processor() or platform.machine()
    if device == "cuda" and torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        where = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} multiprocessors"
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    lines = [
        f"## {datetime.date.today().isoformat()} GPU benchmarks, {where}",
        "",
        f"{versions}; CUDA {torch.version.cuda}.",
    ]
    return "\n".join([*lines, *(["", "Tiny sizes: figures mean nothing."] if tiny else []), ""])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    raise SystemExit(main())
