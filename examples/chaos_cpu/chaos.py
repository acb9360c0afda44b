"""Runs the demo while its server, a trainer rank, its reward function and its disk fail; then counts what was lost.

    python -m examples.chaos_cpu.chaos [--goal 0.9]

Needs the data and the supervised start that run.sh makes. Exit status 1 if a prompt was lost or trained on twice, a
process was left behind, or the goal was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from examples.chaos_cpu.report import Fault, account_of, failures_of, write_up
from examples.chaos_cpu.reward import FAULTS
from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.rollout.batches import list_batches

RUN, DISK = Path("runs/chaos"), Path("runs/chaos-disk")
STEPS, INTERVAL, MAX_STALENESS, UPDATES = 40, 4, 1, 4
OVERRIDES = (
    "run.name=chaos",
    "run.overwrite=true",
    "model.hf_path=runs/chaos-sft/hf/latest",
    "data.train=runs/chaos-data/train.jsonl",
    "data.evaluation={heldout: runs/chaos-data/heldout.jsonl}",
    "reward.function=examples/chaos_cpu/reward.py:reward",
    "reward.timeout=2",
    f"rollout.max_staleness={MAX_STALENESS}",
    "rollout.save_batches=true",
    f"checkpoint.interval={INTERVAL}",
    "evaluation.interval=20",
    f"training.steps={STEPS}",
    f"training.minibatches_per_step={UPDATES}",
)
PATIENCE = 180.0
DEATH_SECONDS = 60.0
DISK_MEGABYTES, LEFT_MEGABYTES = 48, 1


class ChaosError(Exception):
    """The run did not do what the next fault needs; there is no going on."""


class Job:
    """One attempt of the run, in processes of its own; what it prints is shown and kept."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("ab")
        self._start = self._log.tell()
        command = [sys.executable, "-m", "megatron_vespo.launch", "--ranks", "2", "examples/digits_cpu/rl.yaml"]
        command += [*OVERRIDES, "--resume", "auto"]
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)

    def processes(self) -> list[psutil.Process]:
        """All processes of the job."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def find(self, part: str, title: str = "") -> psutil.Process:
        """The first process whose command line has this part, as a word of its own."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if part in words and "-S" not in words and title in " ".join(words):
                    return process
        raise ChaosError(f"found no process with {part}")

    def rank(self, number: int) -> psutil.Process:
        """A trainer rank."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "megatron_vespo.train" in process.cmdline() and process.environ().get("RANK") == str(number):
                    return process
        raise ChaosError(f"found no rank {number}")

    def printed(self) -> str:
        """What this attempt has printed until now."""
        return Path(self._log.name).read_bytes()[self._start :].decode(errors="replace")

    def end(self, seconds: float) -> tuple[int, str, bool]:
        """Exit status, what was printed, and whether all of its processes are gone; waits for at most so long."""
        processes = self.processes()
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ChaosError(f"the job did not end within {seconds:g} s") from None
        _, alive = psutil.wait_procs(processes, timeout=10)
        return status, self.printed(), not alive


def last_step() -> int:
    """Number of the last finished step; -1 before the first evaluation is done."""
    path = RUN / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return int(lines[-1].split('"step": ')[1].split(",")[0]) if lines else -1


def total_after(step: int, name: str) -> float:
    """Sum of a metric over the steps finished after this one."""
    steps, values = read_metrics(RUN / "metrics.jsonl").series(name)
    return sum(value for number, value in zip(steps, values, strict=True) if number > step)


def wait_for(condition: Callable[[], bool], what: str, job: Job | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if job is not None and job.process.poll() is not None:
            raise ChaosError(f"the run ended while waiting for {what}; see {RUN}.log")
        if time.monotonic() > deadline:
            raise ChaosError(f"waited {PATIENCE:g} s for {what}")
        time.sleep(0.02)


class Chaos:
    """The faults, one after the other.

    Attributes:
        faults: What was done.
        failures: What should not have been.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.failures: list[str] = []
        self.job = Job(Path(f"{RUN}.log"))

    def after(self, step: int) -> None:
        """Wait for a step."""
        wait_for(lambda: last_step() >= step, f"step {step}", self.job)

    def note(self, what: str, answer: str, step: int, since: float, base: int | None = None) -> None:
        """Write a fault down once the run has finished another step; ``base`` is the one it has gone back to."""
        base = step if base is None else base
        wait_for(lambda: last_step() > base, f"the step after {base}", self.job)
        self.faults.append(Fault(what, step, answer, time.monotonic() - since))
        print(f"chaos: {what} after step {step}: {answer}, next step after {self.faults[-1].seconds:.0f} s", flush=True)

    def kill_server(self, when: str) -> None:
        """SIGKILL of SGLang; the run must go on by itself."""
        server = self.job.find("sglang.launch_server")
        if when == "during a push":
            words = server.cmdline()
            wait_for_pause(f"http://127.0.0.1:{words[words.index('--port') + 1]}")
        if when == "during training":
            # A batch is written just before training on it, while the server works on the next one.
            batches = len(list_batches(RUN / "rollouts"))
            wait_for(lambda: len(list_batches(RUN / "rollouts")) > batches, "the next batch", self.job)
        step, since = last_step(), time.monotonic()
        server.kill()
        wait_for(lambda: last_step() > step, f"the step after {step}", self.job)
        self.expect(total_after(step, "perf/server_losses") == 1, f"a server killed {when} was not found lost once")
        resent = total_after(step, "perf/resubmitted_requests")
        self.note(
            f"server killed {when}", f"started again, weights pushed, {resent:.0f} requests sent again", step, since
        )

    def kill_rank(self) -> None:
        """SIGKILL of a trainer rank; the job must end by itself, name it, and leave nothing behind."""
        step, since = last_step(), time.monotonic()
        self.job.rank(1).kill()
        status, printed, clean = self.job.end(DEATH_SECONDS)
        took = time.monotonic() - since
        self.expect(status != 0 and "rank 1" in printed and "SIGKILL" in printed, "the dead rank was not named")
        self.expect(clean, "processes were left behind by a dead rank")
        self.resume(f"trainer rank 1 killed; job ended in {took:.0f} s, named it", step, since)

    def stop(self) -> None:
        """SIGTERM: save and leave."""
        step, since = last_step(), time.monotonic()
        self.job.process.send_signal(signal.SIGTERM)
        status, printed, clean = self.job.end(PATIENCE)
        self.expect(status == 0 and "stopped after step" in printed, "SIGTERM did not save and leave")
        self.expect(clean, "processes were left behind by a run that was stopped")
        self.resume("SIGTERM; saved and left", step, since)

    def fill_disk(self) -> None:
        """No room for the next checkpoint: an error, and the last one usable."""
        ballast, step, since = DISK / "ballast", last_step(), time.monotonic()
        space = os.statvfs(DISK)
        ballast.write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - LEFT_MEGABYTES * 2**20)))
        status, printed, clean = self.job.end(PATIENCE)
        self.expect(status != 0 and "No space left on device" in printed, "a full disk was not named")
        self.expect(printed.count("error:") == 1, "a full disk was told of more than once")
        self.expect(clean, "processes were left behind by a full disk")
        ballast.unlink()
        self.resume("disk full during a save; run ended, last checkpoint intact", step, since)

    def resume(self, what: str, step: int, since: float) -> None:
        """Start the job again."""
        saved = [path.name for path in (RUN / "checkpoints").glob("iter_*")]
        if not saved:
            raise ChaosError("no checkpoint is left")
        self.job = Job(Path(f"{RUN}.log"))
        # Steps after the checkpoint have been taken back by then.
        wait_for(lambda: "restoring the checkpoint" in self.job.printed(), "the resumed run", self.job)
        self.note(what, f"resumed from {max(saved)}", step, since, base=int(max(saved)[5:]))

    def expect(self, fine: bool, failure: str) -> None:
        if not fine:
            self.failures.append(failure)


def wait_for_pause(url: str) -> None:
    """Wait until a push has paused the server: it is not ready then."""
    with httpx.Client(trust_env=False, timeout=5) as client:
        wait_for(lambda: client.get(f"{url}/ready").status_code != httpx.codes.OK, "a push")


def small_disk() -> bool:
    """Let the checkpoints lie on a small file system, if this user may mount one."""
    DISK.mkdir(parents=True, exist_ok=True)
    options = f"size={DISK_MEGABYTES}m"
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(DISK)], capture_output=True).returncode == 0
    )


def run(goal: float, mounted: bool) -> list[str]:
    """All faults, then the report; what failed."""
    began = time.monotonic()
    Path(f"{RUN}.log").unlink(missing_ok=True)
    shutil.rmtree(RUN, ignore_errors=True)  # an earlier one would be resumed
    chaos = Chaos()
    try:
        wait_for(lambda: last_step() >= 0, "the first evaluation", chaos.job)
        if mounted:
            (RUN / "checkpoints").symlink_to(DISK.resolve())
        chaos.after(2)
        chaos.kill_server("while it generates")
        chaos.after(7)
        chaos.kill_server("during a push")
        chaos.after(12)
        chaos.kill_rank()
        chaos.after(17)
        chaos.stop()
        if mounted:
            chaos.after(22)
            chaos.fill_disk()
        else:
            print("chaos: no small file system can be mounted here, so no disk is filled: that needs root", flush=True)
        chaos.after(27)
        chaos.kill_server("during training")
        status, _, clean = chaos.job.end(4 * PATIENCE)
        chaos.expect(status == 0, f"the run ended with status {status}")
        chaos.expect(clean, "processes were left behind at the end")
    except ChaosError as error:
        chaos.failures.append(str(error))
    finally:
        if chaos.job.process.poll() is None:
            os.killpg(chaos.job.process.pid, signal.SIGKILL)
    bound, failures, account = (MAX_STALENESS + 1) * UPDATES - 1, chaos.failures, None
    if last_step() == STEPS:  # only then do checkpoint, batches and metrics tell of the same step
        account = account_of(RUN)
        failures = [*failures, *failures_of(account, STEPS, bound, goal, len(FAULTS))]
    elif not failures:
        failures = [f"{last_step()} of {STEPS} steps"]
    RUN.mkdir(parents=True, exist_ok=True)
    report = write_up(chaos.faults, account, time.monotonic() - began, failures)
    (RUN / "report.md").write_text(report)
    print(f"\n{report}\nreport: {RUN / 'report.md'}, what the run printed: {RUN}.log")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--goal", type=float, default=0.9, help="held-out accuracy that must be reached")
    options = parser.parse_args()
    mounted = small_disk()
    try:
        return 1 if run(options.goal, mounted) else 0
    finally:
        if mounted:
            subprocess.run(["umount", str(DISK)], check=False)


if __name__ == "__main__":
    sys.exit(main())
