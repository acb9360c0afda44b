"""SIGTERM and SIGINT ask a run to finish its step, save and leave; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from megatron_vespo.processes import a_local_rank_is_gone

# Slurm signals every process of a job, and the launcher passes on what it gets: a rank then gets one request twice.
_SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """Whether somebody asked this process to stop.

    Signals end the process at once, by SystemExit so that what is open is closed, until :meth:`defer` says that there
    is something to finish first. From then on the first signal is a request, and only a second one ends the process.

    SIGTERM is also how torchrun's agent ends the ranks that are left once one of them has died. That is no request:
    there is nothing to finish without that rank. The two are told apart by whether all ranks of this node are there.

    SIGHUP, of a terminal that goes away, counts as SIGTERM unless it is ignored, as nohup does.

    Args:
        on_request: Called in the signal handler at the first deferred request.
    """

    def __init__(self, on_request: Callable[[], None] = lambda: None) -> None:
        self._on_request = on_request
        self._deferred = False
        self._handled: list[signal.Signals] = []
        self._requested_at: float | None = None
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for and has been deferred."""
        return self._requested_at is not None

    def install(self) -> None:
        """Handle the signals; in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
                self._handled.append(number)

    def defer(self) -> None:
        """From now on somebody asks :attr:`requested` from time to time."""
        self._deferred = True

    def uninstall(self) -> None:
        """Let signals end the process without a word: everything is closed."""
        for number in self._handled:
            signal.signal(number, signal.SIG_DFL)
        self._handled.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked child inherits the handler, but nobody asks it.
        if not self._deferred or os.getpid() != self._process or a_local_rank_is_gone():
            raise SystemExit(128 + number)
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at = now
            self._on_request()
        elif now - self._requested_at > _SAME_REQUEST_SECONDS:
            raise SystemExit(128 + number)


def announce_stop() -> None:
    """Say on the console that the run will stop. For a signal handler, where print() may meet itself."""
    os.write(2, b"stopping after this step; a second signal ends at once\n")
