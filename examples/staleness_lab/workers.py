"""Processes that run cells, one a core: forked when torch and Megatron are imported, kept for many cells.

What goes wrong in a cell, up to the death of its process, is told and costs that cell alone.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from examples.staleness_lab.cell import run_cell
from examples.staleness_lab.outcome import Report, outcome_path
from examples.staleness_lab.settings import Cell, Task
from examples.staleness_lab.start import make_start
from megatron_vespo import guard, parallel
from megatron_vespo.errors import UserError

_CONTEXT = multiprocessing.get_context("fork")


def in_a_process[T](function: Callable[..., T], *args: object) -> T:
    """The value of a function in a rank of its own, so that this process never has threads and can be forked.

    Raises:
        RuntimeError: The function failed.
    """
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        succeeded, value = ours.recv()
    except EOFError:
        succeeded, value = False, "its process died"
    process.join()
    if not succeeded:
        raise RuntimeError(value)
    return value


def prepare_start(folder: Path, task: Task) -> None:
    """Make what all runs begin with, unless it is there."""
    if not folder.is_dir():
        in_a_process(make_start, folder, task)


def run_cells(cells: Sequence[Cell], start: Path, folder: Path, workers: int) -> Iterator[Report]:
    """Run cells and report each as it ends; the outcome's file is there then.

    Args:
        cells: In the order in which they are begun.
        start: Folder that ``make_start`` made.
        folder: Of the sweep.
        workers: Processes.
    """
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    waiting = list(cells)
    busy: dict[Connection, tuple[_Worker, Cell]] = {}
    idle = [_Worker(start, folder) for _ in range(min(workers, len(waiting)))]
    try:
        while waiting or busy:
            while waiting and idle:
                worker = idle.pop()
                worker.connection.send(waiting[0])
                busy[worker.connection] = worker, waiting.pop(0)
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker, cell = busy.pop(connection)
                try:
                    outcome, error = connection.recv()
                    idle.append(worker)
                except EOFError:
                    outcome, error = None, f"its process died with exit code {worker.close()}"
                    idle.append(_Worker(start, folder))
                yield Report(cell, outcome, error)
    finally:
        for worker in (*idle, *(worker for worker, _ in busy.values())):
            worker.close()


class _Worker:
    def __init__(self, start: Path, folder: Path) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_work, args=(theirs, start, folder), daemon=True)
        self._process.start()
        theirs.close()

    def close(self) -> int | None:
        """End it, whatever it does; its exit code."""
        self.connection.close()
        self._process.join(timeout=1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        return self._process.exitcode


def _join_alone() -> None:
    guard.prctl(guard.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    logging.getLogger("megatron").setLevel(logging.ERROR)  # it deprecates GPTModel for every model that is built
    torch.set_num_threads(1)
    parallel.initialize_alone()


def _answer(connection: Connection, function: Callable[..., object], args: Sequence[object]) -> None:
    try:
        _join_alone()
        connection.send((True, function(*args)))
    except Exception:  # noqa: BLE001 - the parent raises it
        connection.send((False, traceback.format_exc()))
    finally:
        connection.close()
        os._exit(0)  # nothing of the parent's may run here at exit


def _work(connection: Connection, start: Path, folder: Path) -> None:
    _join_alone()
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            outcome = run_cell(cell, start)
            outcome.write(outcome_path(folder, cell))
            connection.send((outcome, ""))
        except UserError as error:
            connection.send((None, str(error)))
        except Exception:  # noqa: BLE001 - reported, and the next cell may be a better one
            connection.send((None, traceback.format_exc()))
