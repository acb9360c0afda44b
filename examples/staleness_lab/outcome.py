"""What is kept of a run, and the words for how it ended. No torch here."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.staleness_lab.settings import Cell
from megatron_vespo.files import atomic_write

# Updates at the end of a run that its end is judged by.
_LAST = 16
GOOD = 0.9
FROZEN_SHARE = 0.9


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        cell: What was run, as it is written in a file.
        history: A value for each update, by column; null where there was none or it was not finite.
        accuracy: Held-out accuracy: (updates made, share).
        seconds: Process CPU time.
        diverged: Message of the error that ended the run early; empty: none.
    """

    cell: dict[str, Any]
    history: dict[str, list[float | None]]
    accuracy: list[tuple[int, float]]
    seconds: float
    diverged: str = ""

    @property
    def final(self) -> float:
        """Held-out accuracy at the end, mean of the last quarter of the measurements; 0 of a run that diverged.

        A single one goes up and down by a tenth after convergence.
        """
        last = self.accuracy[-max(len(self.accuracy) // 4, 1) :]
        return 0.0 if self.diverged else float(np.mean([share for _, share in last]))

    @property
    def updates_to_good(self) -> float | None:
        """Updates until accuracy was .9 for the first time; None: never."""
        return next((float(updates) for updates, share in self.accuracy if share >= GOOD), None)

    @property
    def best(self) -> float:
        """The highest that was measured."""
        return max(share for _, share in self.accuracy)

    @property
    def collapsed(self) -> bool:
        """Whether it ended with less than half of its best accuracy, or below where it began."""
        return self.final < max(self.best / 2, self.accuracy[0][1] - 0.05)

    @property
    def frozen(self) -> bool:
        """Whether more than 90 % of the last updates' samples had phi < 0.1."""
        share = self.last("phi_small_share")
        return share is not None and share > FROZEN_SHARE

    def last(self, column: str) -> float | None:
        """Mean over the last updates."""
        return mean(self.history.get(column, [])[-_LAST:])

    def mean(self, column: str) -> float | None:
        """Mean over all updates; None of a column that the run did not have."""
        return mean(self.history.get(column, []))

    def write(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        atomic_write(path, json.dumps(asdict(self)))


@dataclass(frozen=True)
class Report:
    """A cell has ended: with an outcome, which lies in its file, or with an error."""

    cell: Cell
    outcome: Outcome | None
    error: str = ""


def mean(values: list[float | None]) -> float | None:
    """Of those that are there."""
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def read_outcome(path: Path) -> Outcome:
    """What ``write`` wrote."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["accuracy"] = [(int(update), share) for update, share in tree["accuracy"]]
    return Outcome(**tree)


def outcome_path(folder: Path, cell: Cell) -> Path:
    """Where the outcome of a cell is kept."""
    return folder / "cells" / f"{cell.name}.json"


def is_finished(folder: Path, cell: Cell) -> bool:
    """Whether the very same cell has been run."""
    path = outcome_path(folder, cell)
    return path.is_file() and read_outcome(path).cell == cell.definition
