"""Run a sweep and write it up: ``python -m examples.staleness_lab.sweep GRID.yaml --out FOLDER``.

Cells that have been run are not run again, so a sweep that was stopped goes on where it was; the write-up is made anew
after every command.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from examples.staleness_lab.outcome import Outcome, is_finished
from examples.staleness_lab.page import write_up
from examples.staleness_lab.settings import Cell, Grid, Task, read_grid
from megatron_vespo.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit status: 0, or 1 where a cell failed.
    """
    options = _parser().parse_args(arguments)
    try:
        grid = read_grid(options.grid)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    failed = [] if options.only_report else run(grid, options.out, options.workers, options.match)
    write_up(grid, options.out)
    print(f"page: {options.out / 'index.html'}")
    for cell in failed:
        print(f"FAILED: {cell.name}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.staleness_lab.sweep", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("grid", type=Path, help="YAML file that says which cells")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: cores")
    parser.add_argument("--match", default="", help="run only cells whose name contains this")
    parser.add_argument("--only-report", action="store_true", help="run nothing, write up what there is")
    return parser


def run(grid: Grid, folder: Path, workers: int, match: str = "") -> list[Cell]:
    """Run the cells that have not been run, telling how it goes; the cells that failed."""
    cells = [cell for cell in grid.cells() if match in cell.name]
    todo = [cell for cell in cells if not is_finished(folder, cell)]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them done before", flush=True)
    if not todo:
        return []
    print("importing torch and Megatron-Core", flush=True)
    from examples.staleness_lab.headline import launch_cells
    from examples.staleness_lab.workers import prepare_start, run_cells

    start = folder / f"start-{_fingerprint(grid.task)}"
    if not start.is_dir():
        print(f"supervised training of the start, {grid.task.sft_steps} steps", flush=True)
        prepare_start(start, grid.task)
    began, failed = time.monotonic(), []
    with_sglang = grid.task.sampler == "sglang"
    reports = launch_cells(todo, start, folder) if with_sglang else run_cells(todo, start, folder, workers)
    for number, report in enumerate(reports, start=1):
        left = (time.monotonic() - began) / number * (len(todo) - number)
        ended = _in_words(report.outcome) if report.outcome else f"FAILED\n{report.error}"
        print(f"[{number}/{len(todo)}, {left / 60:.0f} min left] {report.cell.name}: {ended}", flush=True)
        if report.outcome is None:
            failed.append(report.cell)
    return failed


def _fingerprint(task: Task) -> str:
    """Of what the start depends on: another task, another start."""
    fields = {"hidden_size", "moe_intermediate_size", "num_experts", "sft_steps", "wrong_sum"}
    return hashlib.sha256(task.model_dump_json(include=fields).encode()).hexdigest()[:8]


def _in_words(outcome: Outcome) -> str:
    marks = [name for name in ("collapsed", "frozen") if getattr(outcome, name)] + ["diverged"] * bool(outcome.diverged)
    accuracy = f"accuracy {outcome.accuracy[0][1]:.2f} -> {outcome.final:.2f} (best {outcome.best:.2f})"
    return f"{accuracy}, {outcome.seconds:.0f} s{''.join(f', {mark.upper()}' for mark in marks)}"


if __name__ == "__main__":
    sys.exit(main())
