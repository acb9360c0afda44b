"""Outcomes of the seeds put together: ``table.json`` for programs, ``table.md`` for people. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.staleness_lab.outcome import Outcome, is_finished, outcome_path, read_outcome
from examples.staleness_lab.settings import Cell, Grid

type Figure = Callable[[Outcome], float | None]


def _mean_of(column: str) -> Figure:
    return lambda outcome: outcome.mean(column)


def _last_of(column: str) -> Figure:
    return lambda outcome: outcome.last(column)


FIGURES: dict[str, tuple[str, Figure]] = {
    "final": ("accuracy at the end", lambda outcome: outcome.final),
    "updates_to_good": ("updates to .9", lambda outcome: outcome.updates_to_good),
    "best": ("best accuracy", lambda outcome: outcome.best),
    "log_w_abs": ("mean |log W|", _mean_of("log_w_abs")),
    "kl_per_token": ("KL a token", _mean_of("kl_per_token")),
    "router_flips": ("flipped experts", _mean_of("router_flip_rate")),
    "ess_w": ("ESS of W", _mean_of("ess_w")),
    "ess_phi": ("ESS of kappa", _mean_of("ess_phi")),
    "phi_mean": ("mean kappa", _mean_of("phi_mean")),
    "phi_small_share": ("kappa < 0.1", _mean_of("phi_small_share")),
    "entropy_last": ("entropy at the end", _last_of("entropy")),
    "grad_norm": ("gradient norm", _mean_of("grad_norm")),
    "seconds": ("CPU seconds", lambda outcome: outcome.seconds),
}
"""What the tables say of a run: heading and value. Means are over all updates."""


@dataclass(frozen=True)
class Stats:
    """One figure over the seeds."""

    mean: float
    min: float
    max: float
    values: list[float]

    def __str__(self) -> str:
        digits = 0 if abs(self.mean) >= 100 else 2 if abs(self.mean) >= 0.1 else 3
        if len(self.values) == 1:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} [{self.min:.{digits}f}..{self.max:.{digits}f}]"


@dataclass(frozen=True)
class Row:
    """The seeds of one method under one setting."""

    method: str
    n: int
    mismatch: str
    lr: float
    seeds: list[int]
    collapsed: int
    frozen: int
    diverged: int
    figures: dict[str, Stats | None]

    @property
    def marks(self) -> str:
        """``2 collapsed, 1 frozen``; empty where none did."""
        counts = {"collapsed": self.collapsed, "frozen": self.frozen, "diverged": self.diverged}
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


@dataclass(frozen=True)
class Results:
    """The outcomes of a sweep so far.

    Attributes:
        grid: The sweep.
        outcomes: By cell, in the grid's order of methods.
    """

    grid: Grid
    outcomes: list[tuple[Cell, Outcome]]

    @property
    def settings(self) -> list[tuple[str, float]]:
        """Mismatch and learning rate, in the order of the grid."""
        order = ["none", *self.grid.mismatches]
        return sorted({(cell.mismatch, cell.lr) for cell, _ in self.outcomes}, key=lambda s: (order.index(s[0]), s[1]))

    @property
    def methods(self) -> list[str]:
        """In the order of the grid."""
        found = {cell.method for cell, _ in self.outcomes}
        return [name for name in self.grid.methods if name in found]

    def ns(self, mismatch: str, lr: float) -> list[int]:
        """Minibatches per rollout batch that there are."""
        return sorted({cell.n for cell, _ in self.outcomes if (cell.mismatch, cell.lr) == (mismatch, lr)})

    def of(self, method: str, n: int, mismatch: str, lr: float) -> list[tuple[Cell, Outcome]]:
        """The seeds."""
        return [
            (cell, outcome)
            for cell, outcome in self.outcomes
            if (cell.method, cell.n, cell.mismatch, cell.lr) == (method, n, mismatch, lr)
        ]

    def rows(self) -> list[Row]:
        """Settings after settings, methods in the order of the grid."""
        rows = []
        for mismatch, lr in self.settings:
            for n in self.ns(mismatch, lr):
                for method in self.methods:
                    if seeds := self.of(method, n, mismatch, lr):
                        rows.append(_row(method, n, mismatch, lr, seeds))
        return rows


def read_results(grid: Grid, folder: Path) -> Results:
    """What has been run of the grid."""
    cells = [cell for cell in grid.cells() if is_finished(folder, cell)]
    return Results(grid, [(cell, read_outcome(outcome_path(folder, cell))) for cell in cells])


def _row(method: str, n: int, mismatch: str, lr: float, seeds: Sequence[tuple[Cell, Outcome]]) -> Row:
    outcomes = [outcome for _, outcome in seeds]
    return Row(
        method,
        n,
        mismatch,
        lr,
        [cell.seed for cell, _ in seeds],
        sum(outcome.collapsed for outcome in outcomes),
        sum(outcome.frozen for outcome in outcomes),
        sum(bool(outcome.diverged) for outcome in outcomes),
        {name: _stats(map(figure, outcomes)) for name, (_, figure) in FIGURES.items()},
    )


def _stats(values: Iterable[float | None]) -> Stats | None:
    found = [value for value in values if value is not None]
    return Stats(float(np.mean(found)), min(found), max(found), found) if found else None


def setting_name(mismatch: str, lr: float) -> str:
    """As a heading."""
    return f"{'no mismatch' if mismatch == 'none' else f'mismatch {mismatch}'}, learning rate {lr:g}"


def write_json(results: Results, path: Path) -> None:
    """All rows."""
    path.write_text(json.dumps([asdict(row) for row in results.rows()], indent=1), encoding="utf-8")


def write_markdown(results: Results, path: Path) -> None:
    """For each setting a table of final accuracies by method and N, and all figures below."""
    lines = [f"# {results.grid.title}", "", "Mean over seeds [lowest..highest]."]
    for mismatch, lr in results.settings:
        ns = results.ns(mismatch, lr)
        lines += ["", f"## Accuracy at the end: {setting_name(mismatch, lr)}", ""]
        lines += _table(["method", *(f"N = {n}" for n in ns)], accuracies(results, mismatch, lr))
    lines += ["", "## All figures", ""]
    heading = ["method", "N", "mismatch", "lr", "seeds", *(title for title, _ in FIGURES.values()), "marks"]
    lines += _table(heading, [details(row) for row in results.rows()])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def accuracies(results: Results, mismatch: str, lr: float) -> list[list[str]]:
    """A line a method: its name, then final accuracy and marks for each N."""
    lines = []
    for method in results.methods:
        cells: list[str] = []
        for n in results.ns(mismatch, lr):
            seeds = results.of(method, n, mismatch, lr)
            row = _row(method, n, mismatch, lr, seeds) if seeds else None
            cells.append("" if row is None else f"{row.figures['final']}{f' ({row.marks})' if row.marks else ''}")
        if any(cells):
            lines.append([method, *cells])
    return lines


def details(row: Row) -> list[str]:
    """All figures of a row as texts."""
    figures: list[Any] = ["" if stats is None else stats for stats in row.figures.values()]
    return [row.method, str(row.n), row.mismatch, f"{row.lr:g}", str(len(row.seeds)), *map(str, figures), row.marks]


def _table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    def escaped(cells: Sequence[str]) -> str:
        return " | ".join(cell.replace("|", "\\|") for cell in cells)

    return [f"| {escaped(cells)} |" for cells in (heading, ["---"] * len(heading), *lines)]
