"""What a benchmark found: a table, written to a file after every row, so that what was measured survives a crash."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

Cell = str | float | int | None


@dataclass
class Report:
    """One table.

    Attributes:
        title: What was measured. Reports of one title are one table.
        columns: Names, units included.
        note: What one must know to read it.
        rows: Cells of each row.
        failures: What went wrong, one line for each.
        path: Where it is kept; None: nowhere.
    """

    title: str
    columns: Sequence[str]
    note: str = ""
    rows: list[list[Cell]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    path: str | None = None

    def add(self, *cells: Cell) -> None:
        """Add a row, show it, and keep it."""
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells for the columns {', '.join(self.columns)}")
        self.rows.append(list(cells))
        print(
            f"  {self.title}: {', '.join(f'{c} {text(v)}' for c, v in zip(self.columns, cells, strict=True))}",
            flush=True,
        )
        self.save()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Go on after a failure within; it is kept, and the exit status will say so."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the other rows are measured all the same
            traceback.print_exc()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.failures.append(f"{name}: {type(error).__name__}: {reason[:200]}")
            self.save()

    def save(self) -> None:
        """Write what there is so far."""
        if self.path is not None:
            Path(self.path).write_text(json.dumps(asdict(self)), encoding="utf-8")


def load(path: Path) -> Report | None:
    """A report that a benchmark has left, or None where it left none."""
    return Report(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def merged(reports: Sequence[Report]) -> list[Report]:
    """Reports of one title put together, in the order of their first."""
    together: dict[str, Report] = {}
    for report in reports:
        first = together.setdefault(report.title, Report(report.title, report.columns, report.note))
        first.rows += report.rows
        first.failures += report.failures
    return list(together.values())


def text(value: Cell) -> str:
    """Three significant digits, more for whole numbers."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def markdown(report: Report) -> str:
    """The table as a page has it."""
    lines = [f"### {report.title}", ""]
    if report.rows:
        lines += [f"| {' | '.join(report.columns)} |", f"|{' --- |' * len(report.columns)}"]
        lines += [f"| {' | '.join(map(text, row))} |" for row in report.rows]
    lines += ["", report.note] if report.note else []
    lines += ["", *(f"- FAILED {failure}" for failure in report.failures)] if report.failures else []
    return "\n".join(lines) + "\n"
