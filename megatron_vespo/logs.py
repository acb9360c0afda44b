"""Upstream's warnings and log lines go to a file of each rank; the console is for the run."""

from __future__ import annotations

import logging
import warnings
from logging.handlers import MemoryHandler
from pathlib import Path

_CAPACITY = 100_000


class RankLog:
    """Collects log records and Python warnings from the first import on, and writes them once there is a run folder.

    If the process ends before, they go to the standard error stream.
    """

    def __init__(self) -> None:
        self._buffer = MemoryHandler(_CAPACITY, flushLevel=logging.CRITICAL + 1, target=logging.StreamHandler())
        self._buffer.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root = logging.getLogger()
        root.addHandler(self._buffer)
        root.setLevel(logging.WARNING)
        logging.captureWarnings(True)
        warnings.simplefilter("default")

    def adopt(self, name: str) -> None:
        """Take over a library's logger that prints to the standard error stream by a handler of its own."""
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True

    def write_to(self, path: Path) -> None:
        """Write what was collected and all that follows to a file."""
        handler = logging.FileHandler(path, encoding="utf-8")
        handler.setFormatter(self._buffer.formatter)
        self._buffer.setTarget(handler)
        self._buffer.flush()
        root = logging.getLogger()
        root.removeHandler(self._buffer)
        root.addHandler(handler)
