"""Run the reference and every layout, one after the other, and compare. No Megatron in this process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.config import Config
from megatron_vespo.config_file import load_config
from megatron_vespo.errors import UserError
from megatron_vespo.launch import RankFailure, launch_ranks
from megatron_vespo.layouts.compare import QUANTITIES, Row, compare
from megatron_vespo.layouts.layout import Layout
from megatron_vespo.layouts.outcome import Outcome, read_weights
from megatron_vespo.layouts.settings import UPDATE_OVERRIDES, check_comparable
from megatron_vespo.layouts.work import work_arguments
from megatron_vespo.rollout.batches import load_batch
from megatron_vespo.types import Sample

REFERENCE, WORKER = "megatron_vespo.layouts.reference", "megatron_vespo.layouts.worker"

type Launch = Callable[[Layout, Sequence[str], Path], RankFailure | None]
"""Runs the ranks of a layout with these arguments for the worker, their logs in this folder, as ``launch_ranks``."""


def launch_worker(layout: Layout, arguments: Sequence[str], logs: Path) -> RankFailure | None:
    """Run the ranks under torchrun's engine."""
    return launch_ranks(layout.ranks, ["-m", WORKER, *arguments], logs)


@dataclass(frozen=True)
class Comparison:
    """All layouts on one batch.

    Attributes:
        samples: Of the batch.
        reference: What the update does.
        rows: The layouts, in the order asked for.
    """

    samples: Sequence[Sample]
    reference: Outcome
    rows: Sequence[Row]

    @property
    def agrees(self) -> bool:
        """Whether every layout does."""
        return all(row.agrees for row in self.rows)


def compare_layouts(
    config: Path,
    batch: Path,
    layouts: Sequence[Layout],
    overrides: Sequence[str],
    folder: Path,
    *,
    launch: Launch = launch_worker,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Compare layouts with the float64 reference on a saved batch.

    Args:
        config: Configuration file of a run.
        batch: Rollout batch that a run saved.
        layouts: What to run.
        overrides: ``section.key=value``; they win over ``UPDATE_OVERRIDES``, which win over the file.
        folder: Existing, empty; gets the ranks' logs in ``<layout>/logs``.
        launch: Runs the ranks of a layout.
        say: Shows progress.

    Raises:
        UserError: Configuration or batch are wrong, the reference cannot honour an option, or it failed. A layout that
            fails raises nothing; it is a row of the result.
    """
    overrides = [*UPDATE_OVERRIDES, *overrides]
    samples = _check(load_config(config, overrides), batch)
    longest = max(max(sample.total_length - 1, 1) for sample in samples)
    say(f"reference in float64, {len(samples)} samples ...")
    started = time.monotonic()
    _run_reference(work_arguments(config, batch, folder / "reference", overrides), folder)
    reference, weights = Outcome.read(folder / "reference"), dict(read_weights(folder / "reference"))
    say(f"reference in float64: {time.monotonic() - started:.0f} s")
    names = [sample.name for sample in samples]
    rows = []
    for layout in layouts:
        started = time.monotonic()
        out = folder / layout.name
        arguments = work_arguments(config, batch, out / "outcome", [*overrides, *layout.overrides(longest)])
        try:
            ours = _run_layout(launch, layout, arguments, out)
            found = compare(ours, reference, names, read_weights(out / "outcome"), weights)
            row = Row(layout, time.monotonic() - started, ours.facts, found)
            shutil.rmtree(out / "outcome")
        except UserError as error:
            row = Row(layout, time.monotonic() - started, error=str(error))
        say(f"{layout.name}: {verdict(row)} ({row.seconds:.0f} s)")
        rows.append(row)
    return Comparison(samples, reference, rows)


def _check(config: Config, path: Path) -> list[Sample]:
    """The samples of the batch, if a comparison on them is possible."""
    check_comparable(config)
    batch = load_batch(path)
    if batch.temperature != config.rollout.temperature:
        raise UserError(
            f"rollout.temperature={config.rollout.temperature}, but {path} was sampled at {batch.temperature}: log W"
            " would compare two distributions; set it to that"
        )
    samples = [sample for group in batch.groups for sample in group.samples]
    if not any(len(sample.response_ids) for sample in samples):
        raise UserError(f"{path}: {len(samples)} samples without a response token; there is nothing to compare")
    return samples


def verdict(row: Row) -> str:
    """One or a few words on a layout."""
    if row.error:
        return "FAILED"
    return "ok" if row.agrees else "OFF: " + ", ".join(QUANTITIES[key].heading for key in row.off)


def _run_reference(arguments: Sequence[str], folder: Path) -> None:
    """In a process of its own, so that this one stays small and Megatron is in neither."""
    log = folder / "reference.log"
    # Samples run one by one: on small models more threads only wait for each other.
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // 2, 1)), **os.environ}
    command = [sys.executable, "-m", REFERENCE, *arguments]
    with log.open("wb") as file:
        result = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
    if result.returncode:
        raise UserError(f"the reference failed: {_last_words(log)}\n(all of it: {log})")


def _run_layout(launch: Launch, layout: Layout, arguments: Sequence[str], out: Path) -> Outcome:
    logs = out / "logs"
    logs.mkdir(parents=True)
    failure = launch(layout, arguments, logs)
    if failure is not None:
        rank, status = failure
        # A rank that refuses something says so; the others then lose their connections to it and crash.
        errors = {log.parent.name: _last_words(log) for log in sorted(logs.glob("*/*/*/stderr.log"))}
        words = next((text for text in errors.values() if text.startswith("error: ")), errors.get(str(rank), ""))
        raise UserError(f"rank {rank} ended with exit status {status}: {words or 'it printed nothing'}\n(logs: {logs})")
    return Outcome.read(out / "outcome")


def _last_words(log: Path) -> str:
    """The ``error: ...`` line of a log, or the last line that is not empty."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")
