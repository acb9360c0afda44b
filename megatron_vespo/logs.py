"""Upstream's warnings and log lines go to a file of each rank; the console is for the run, and for one error."""

from __future__ import annotations

import faulthandler
import logging
import re
import sys
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

_CAPACITY = 100_000


class RankLog:
    """Collects log records and Python warnings from the first import on, and writes them once there is a run folder.

    If the process ends before, they go to the standard error stream. So does a crash's Python stack.
    """

    def __init__(self) -> None:
        self._buffer = MemoryHandler(_CAPACITY, flushLevel=logging.CRITICAL + 1, target=logging.StreamHandler())
        self._buffer.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(self._buffer)
        root.setLevel(logging.WARNING)
        logging.captureWarnings(True)
        warnings.simplefilter("default")
        faulthandler.enable()
        self.path: Path | None = None
        """The file, once there is one."""

    def adopt(self, name: str) -> None:
        """Take over a library's logger that prints to the standard error stream by a handler of its own."""
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True

    def write_to(self, path: Path) -> None:
        """Write what was collected and all that follows to a file; a crash's stack too."""
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(self._buffer.formatter)
        self._buffer.setTarget(handler)
        self._buffer.flush()
        root = logging.getLogger()
        root.removeHandler(self._buffer)
        root.addHandler(handler)
        self._crashes = path.open("a", encoding="utf-8")  # stays open: faulthandler writes to the bare descriptor
        faulthandler.enable(self._crashes)
        self.path = path


def error_file(log_folder: Path) -> Path:
    """Where a run's first error is written: whoever gets to create this file also tells the console."""
    return log_folder / "error.txt"


def report_once(log_folder: Path, who: str, message: str) -> bool:
    """Print an error that ends the run, unless another process of the run has printed one.

    What the others die of is mostly a consequence of the first error.

    Args:
        log_folder: The run's ``logs``. Where it is not there, yet or on this node, the error is printed.
        who: ``rank 3``, or ``launcher``.
        message: What is wrong and what would be right.

    Returns:
        Whether it was printed.
    """
    try:
        with error_file(log_folder).open("x", encoding="utf-8") as file:
            file.write(f"{who}: {message}\n")
    except FileExistsError:
        return False
    except FileNotFoundError:
        pass
    print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201
    return True


def reporting_rank(log_folder: Path) -> int | None:
    """The rank whose error ended the run; None where no rank has told of one."""
    file = error_file(log_folder)
    found = re.match(r"rank (\d+): ", file.read_text(encoding="utf-8")) if file.is_file() else None
    return int(found[1]) if found else None
