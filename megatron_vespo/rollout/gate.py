"""When servers of this process may be started: not while a trainer has its memory on their devices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StartGate:
    """Open at first. Starts wait before a shut gate; shutting it waits for starts under way."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = True
        self._starting = 0

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Start a server within; waits until the gate is open."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open)
            self._starting += 1
        try:
            yield
        finally:
            with self._changed:
                self._starting -= 1
                self._changed.notify_all()

    def shut(self) -> None:
        """From now on no server is starting."""
        with self._changed:
            self._is_open = False
            self._changed.wait_for(lambda: not self._starting)

    def open(self) -> None:
        """Servers may be started again."""
        with self._changed:
            self._is_open = True
            self._changed.notify_all()
