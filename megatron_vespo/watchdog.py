"""Finds ranks that are stuck and ends the job with a message that says who and where.

Without it a rank that hangs, or whose process was stopped, leaves the others in a collective until that times out, and
the message is then about the collective.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType, TracebackType

import msgspec
import torch.distributed as dist

from megatron_vespo import parallel
from megatron_vespo.logs import report_once

_EXIT_STATUS = 1
# Seconds between two looks, at most.
_LONGEST_INTERVAL = 5.0
# Seconds that ranks get to answer an alarm.
_ANSWER_SECONDS = 5.0
# Ranks in a message.
_SHOWN_RANKS = 16
_PACKAGE, _COLLECTIVES = str(Path(__file__).parent), str(Path(dist.__file__).parent)
_ALARM, _REPORTED = "alarm", "reported"


class RankState(msgspec.Struct, frozen=True):
    """Where a rank's main thread is.

    Attributes:
        place: Name of the place.
        changes: Places entered or left so far; the ranks of a job go through the same ones.
        seconds: How long it has been there.
        line: Its innermost line in this package.
        in_collective: Whether it waits in a function of torch.distributed.
    """

    place: str
    changes: int
    seconds: float
    line: str
    in_collective: bool


class RankProcess(msgspec.Struct, frozen=True):
    """The process of a rank."""

    host: str
    pid: int


def culprits(states: Mapping[int, RankState], size: int) -> tuple[list[int], str]:
    """The ranks that the others wait for, as far as can be told, and why these.

    Args:
        states: Of the ranks that answered.
        size: Number of ranks.
    """
    silent = [rank for rank in range(size) if rank not in states]
    if silent:
        return silent, "no answer: stopped, or its machine is gone"
    least = min(state.changes for state in states.values())
    behind = [rank for rank, state in states.items() if state.changes == least]
    if len(behind) < size:
        return behind, "behind the others"
    elsewhere = [rank for rank, state in states.items() if not state.in_collective]
    if 0 < len(elsewhere) < size:
        return elsewhere, "in no collective, where the others wait"
    return [], ""


def describe(states: Mapping[int, RankState], size: int, timeout: float) -> str:
    """What the ranks of a stuck job do, in words; arguments as of ``culprits``."""
    longest = max(states, key=lambda rank: states[rank].seconds)
    first = states[longest]
    found, why = culprits(states, size)
    lines = [
        f"stuck: rank {longest} has been in {first.place!r} for {first.seconds:.0f} s, longer than"
        f" run.stuck_timeout={timeout:g}"
    ]
    if found:
        lines.append(f"  the others wait for {_ranks(found)}: {why}")
    elif size > 1:
        lines.append("  all ranks wait in the same place")
    shown = [*found, *(rank for rank in range(size) if rank not in found)]
    for rank in sorted(shown[:_SHOWN_RANKS]):
        state = states.get(rank)
        where = f"in {state.place!r} for {state.seconds:.0f} s, at {state.line}" if state else "no answer"
        lines.append(f"  rank {rank}: {where}")
    if size > _SHOWN_RANKS:
        lines.append(f"  and {size - _SHOWN_RANKS} more")
    return "\n".join(lines)


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS])) + (" and more" if len(ranks) > _SHOWN_RANKS else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


class Watchdog:
    """Watches this rank's main thread from two threads beside it, and the other ranks once this one is stuck.

    A rank is stuck when it has been in one place for ``timeout`` seconds; so are the ranks that wait for it. The first
    of them that notices raises the alarm in the job's key-value store, every rank answers with the place of its main
    thread, and a rank that does not answer is taken for the culprit. Then the processes end, without unwinding: their
    main threads hang.

    The store may hang as well, where rank 0 keeps it and is the one that is stopped. So nothing but one thread ever
    asks it, and the other one tells what it knows if that takes too long.

    Args:
        timeout: Seconds that a rank may stay in one place.
        log_folder: The run's ``logs``; stacks are added to ``rank_N.log``. None: they go to the standard error stream.
    """

    def __init__(self, timeout: float, log_folder: Path | None) -> None:
        self._timeout, self._log_folder = timeout, log_folder
        self._interval = min(_LONGEST_INTERVAL, timeout / 6)
        self._where = ("starting", 0, time.monotonic())  # place, number of changes, since when; replaced in one go
        self._main_thread = threading.get_ident()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to watch the thread that made this object. The job must be initialized."""
        self._rank, self._size = parallel.rank(), parallel.world_size()
        self._store = parallel.separate_store("watchdog")
        self._store.set(f"process/{self._rank}", _pack(RankProcess(socket.gethostname(), os.getpid())))
        for run in (self._exchange, self._keep_time):
            threading.Thread(target=run, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()

    def at(self, place: str) -> AbstractContextManager[None]:
        """Say where the main thread is from now on; as a context, it is where it was before when the body ends."""
        visit = _Visit(self, self._where[0])
        self._move(place)
        return visit

    def _move(self, place: str) -> None:
        self._where = (place, self._where[1] + 1, time.monotonic())

    def _seconds(self) -> float:
        return time.monotonic() - self._where[2]

    def _exchange(self) -> None:
        """The thread that asks the store: notices an alarm, or raises it."""
        try:
            while not self._stopped.wait(self._interval):
                if self._seconds() > self._timeout:
                    self._raise_alarm()
                elif self._store.check([_ALARM]):
                    self._answer()
        except dist.DistError as error:  # whoever keeps the store has ended
            logging.getLogger(__name__).warning("no longer asking the other ranks: %s", error)

    def _keep_time(self) -> None:
        """The thread that never asks the store: tells what this rank knows, should the other one hang."""
        limit = self._timeout + 2 * (self._interval + _ANSWER_SECONDS)
        while not self._stopped.wait(self._interval):
            if self._seconds() > limit:
                self._write_stack()
                self._tell(
                    f"{describe({self._rank: self._state()}, 1, self._timeout)}\n  the other ranks cannot be asked: the"
                    f" job's key-value store, which {_store_keeper()} keeps, does not answer: stopped, or gone"
                )
                os._exit(_EXIT_STATUS)

    def _raise_alarm(self) -> None:
        if self._store.add(_ALARM, 1) > 1:
            self._answer()
        self._write_stack()
        states = self._collect()
        self._tell(describe(states, self._size, self._timeout))
        self._kill_silent(states)
        self._store.set(_REPORTED, "")  # the last thing asked of the store: whoever keeps it ends then
        os._exit(_EXIT_STATUS)

    def _answer(self) -> None:
        """Write this rank's stack and say where it is; then wait for the report, and end."""
        self._write_stack()
        self._store.set(f"state/{self._rank}", _pack(self._state()))
        deadline = time.monotonic() + self._interval + 2 * _ANSWER_SECONDS
        while time.monotonic() < deadline and not self._store.check([_REPORTED]):
            time.sleep(0.1)
        os._exit(_EXIT_STATUS)

    def _collect(self) -> dict[int, RankState]:
        """States of the ranks that answer in time, this one's included."""
        states = {self._rank: self._state()}
        deadline = time.monotonic() + self._interval + _ANSWER_SECONDS
        while len(states) < self._size and time.monotonic() < deadline:
            for rank in range(self._size):
                if rank not in states and self._store.check([f"state/{rank}"]):
                    states[rank] = msgspec.json.decode(self._store.get(f"state/{rank}"), type=RankState)
            time.sleep(0.1)
        return dict(sorted(states.items()))

    def _kill_silent(self, states: Mapping[int, RankState]) -> None:
        """End what does not listen to its launcher any more either, as far as it runs on this machine."""
        for rank in set(range(self._size)) - set(states):
            if self._store.check([f"process/{rank}"]):
                process = msgspec.json.decode(self._store.get(f"process/{rank}"), type=RankProcess)
                if process.host == socket.gethostname():
                    os.kill(process.pid, signal.SIGKILL)

    def _state(self) -> RankState:
        place, changes, _ = self._where
        frame: FrameType | None = sys._current_frames()[self._main_thread]
        assert frame is not None
        in_collective = frame.f_code.co_filename.startswith(_COLLECTIVES)
        innermost = _line(frame)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        return RankState(place, changes, self._seconds(), innermost if frame is None else _line(frame), in_collective)

    def _write_stack(self) -> None:
        stack = "".join(traceback.format_stack(sys._current_frames()[self._main_thread]))
        text = f"stuck in {self._where[0]!r} for {self._seconds():.0f} s; the main thread's stack:\n{stack}"
        if self._log_folder is None:
            print(f"rank {self._rank}: {text}", file=sys.stderr, flush=True)  # noqa: T201
        else:
            with (self._log_folder / f"rank_{self._rank}.log").open("a", encoding="utf-8") as log:
                log.write(text)

    def _tell(self, message: str) -> None:
        message += "\n  if it is merely slow, raise run.stuck_timeout"
        if self._log_folder is None:
            print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201
        else:
            message += f"; the stacks of all ranks: {self._log_folder / 'rank_*.log'}"
            report_once(self._log_folder, f"rank {self._rank}", message)


class _Visit(AbstractContextManager[None]):
    """Goes back to the place that was left."""

    def __init__(self, watchdog: Watchdog, left: str) -> None:
        self._watchdog, self._left = watchdog, left

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watchdog._move(self._left)


def _pack(value: msgspec.Struct) -> str:
    return msgspec.json.encode(value).decode()


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}"


def _store_keeper() -> str:
    """Which process keeps the job's key-value store."""
    return "the launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
