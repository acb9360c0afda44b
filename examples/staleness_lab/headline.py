"""Cells with the real SGLang: the same configuration through the normal launch, its metrics in the same columns."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.staleness_lab.cell import make_config
from examples.staleness_lab.observe import METRIC_COLUMNS
from examples.staleness_lab.outcome import Outcome, Report, outcome_path
from examples.staleness_lab.settings import Cell, Mismatch
from megatron_vespo.config import Config
from megatron_vespo.config_file import dump_config, parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.metrics.records import Records, read_metrics

_REWARD = Path(__file__).parents[1] / "digits_cpu" / "task.py"
_COLUMNS = METRIC_COLUMNS | {
    "reward": "rollout/reward_mean",
    "grad_norm": "train/grad_norm",
    "response_length": "rollout/response_length_mean",
    "router_flip_rate": "health/router_flip_rate",
}
_ACCURACY = "eval/heldout/accuracy"


def launch_config(cell: Cell, start: Path, folder: Path) -> Config:
    """The cell's configuration, with a server.

    Raises:
        UserError: SGLang cannot be perturbed like this.
    """
    possible = Mismatch(sampler_dtype=cell.perturbation.sampler_dtype)
    if cell.perturbation != possible:
        raise UserError(f"mismatch {cell.mismatch}: of the real SGLang only sampler_dtype can be set here")
    tree = make_config(cell, start).model_dump(exclude_unset=True)
    tree["run"] |= {"folder": str(folder / "runs"), "overwrite": True}
    tree["sglang"] = {"max_total_tokens": 16384, "context_length": 64, "dtype": cell.perturbation.sampler_dtype}
    tree["reward"] = {"function": f"{_REWARD}:reward"}
    tree["evaluation"] = {"interval": max(1, cell.task.evaluate_every // cell.n)}
    if cell.perturbation.sampler_dtype != "float32":
        tree["weight_sync"] = {"verify": "none"}
    return parse_config(tree, cell.name)


def launch_cells(cells: Sequence[Cell], start: Path, folder: Path) -> Iterator[Report]:
    """Run cells one after the other, each of which takes all cores, and report each as it ends.

    Args:
        cells: In order.
        start: Folder that ``make_start`` made.
        folder: Of the sweep; runs and their logs go to ``runs/`` there.
    """
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    for cell in cells:
        try:
            outcome = run_with_sglang(cell, start, folder)
            outcome.write(outcome_path(folder, cell))
            yield Report(cell, outcome)
        except UserError as error:
            yield Report(cell, None, str(error))


def run_with_sglang(cell: Cell, start: Path, folder: Path) -> Outcome:
    """Launch the run and wait for its end.

    Raises:
        UserError: It failed, or the cell is not possible.
    """
    config = launch_config(cell, start, folder)
    path = folder / "runs" / f"{cell.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_config(config), encoding="utf-8")
    log = path.with_suffix(".log")
    command = [sys.executable, "-m", "megatron_vespo.launch", str(path)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
        before = _cpu_seconds()
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    metrics = config.run_folder / "metrics.jsonl"
    words = log.read_text(encoding="utf-8", errors="replace")
    diverged = next((line for line in words.splitlines() if "updates in a row were skipped" in line), "")
    if status and not diverged:
        raise UserError(f"the launch of {cell.name} failed with exit status {status}; its log: {log}")
    return outcome_of(cell, read_metrics(metrics), _cpu_seconds() - before, diverged)


def _cpu_seconds() -> float:
    """Of children that have ended and were waited for, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def outcome_of(cell: Cell, records: Records, seconds: float, diverged: str) -> Outcome:
    """A run's metrics as an outcome; the value of a step stands for its N updates.

    Args:
        cell: The cell.
        records: The run's metrics.
        seconds: CPU time.
        diverged: As of an outcome.
    """
    steps = [(step, values) for step, values in zip(records.steps, records.values, strict=True) if step > 0]
    history = {
        column: [values.get(name) for _, values in steps for _ in range(cell.n)] for column, name in _COLUMNS.items()
    }
    log_w = [(values.get("vespo/log_w_mean"), values["rollout/response_length_mean"]) for _, values in steps]
    history["kl_per_token"] = [None if x is None else -x / length for x, length in log_w for _ in range(cell.n)]
    shares = zip(*records.series(_ACCURACY), strict=True)
    accuracy = [(step * cell.n, share) for step, share in shares]
    return Outcome(cell.definition, history, accuracy, seconds, diverged)
