"""Notices servers that die, hang or come back, from a thread of its own; starts those of this process again."""

from __future__ import annotations

import threading
import time

from megatron_vespo.errors import UserError
from megatron_vespo.rollout.fleet import Fleet, Member, State
from megatron_vespo.rollout.gate import StartGate
from megatron_vespo.rollout.server import SGLangServer

WATCH_SECONDS = 0.25
# Between two questions to a server that is gone.
PROBE_SECONDS = 2.0
# A server asked for its health gets as long as it may be silent, but so long at least: it takes a second if well.
HEALTH_SECONDS = 5.0


class Watch:
    """Watches a fleet until it is closed.

    Args:
        fleet: The servers.
        hang_timeout: Seconds without an answer, while requests are in flight, after which a server's health is asked.
        max_restarts: Restarts of one of our own servers without ``fleet.progressed()`` between.
        gate: When servers may be started.
    """

    def __init__(self, fleet: Fleet, *, hang_timeout: float, max_restarts: int, gate: StartGate | None = None) -> None:
        self._fleet, self._hang_timeout, self._max_restarts = fleet, hang_timeout, max_restarts
        self._gate = gate or StartGate()
        self._probed: dict[str, float] = {}
        self._restarting: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching. A restart under way is not waited for."""
        self._ended.set()

    def _run(self) -> None:
        try:
            while not self._ended.wait(WATCH_SECONDS):
                for member in self._fleet.members:
                    self._look_at(member)
        except Exception as error:  # noqa: BLE001 - raised where the run waits
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if not self._ended.is_set():
            self._fleet.failure = error

    def _look_at(self, member: Member) -> None:
        own = self._fleet.own.get(member.url)
        if own is not None and member.state is not State.GONE and not own.is_alive:
            self._fleet.lost(member, member.lives, "its process ended")
        elif member.state is not State.GONE and self._is_silent(member):
            life = member.lives
            if member.control.health(max(self._hang_timeout, HEALTH_SECONDS)):
                member.last_answer = time.monotonic()
            elif self._is_silent(member):
                self._fleet.lost(member, life, f"it hangs: no answer in {self._hang_timeout:g} s, nor to /health")
        if member.state is not State.GONE:
            return
        if own is not None:
            self._begin_restart(member, own)
        elif time.monotonic() - self._probed.get(member.url, 0.0) > PROBE_SECONDS:
            self._probed[member.url] = time.monotonic()
            if member.control.ready() and self._fleet.probe(member):
                self._fleet.announce(f"the server at {member.url} is back")

    def _is_silent(self, member: Member) -> bool:
        silent = time.monotonic() - member.last_answer > self._hang_timeout
        return silent and member.in_flight > 0 and not self._fleet.pushing and not self._fleet.resting

    def _begin_restart(self, member: Member, own: SGLangServer) -> None:
        """Start one of our own servers again, unless that is under way, beside watching the others.

        Raises:
            UserError: It was started too often.
        """
        if member.url in self._restarting:
            return
        if member.restarts >= self._max_restarts:
            raise UserError(
                f"the SGLang server at {own.url} was lost again ({member.reason}) after {self._max_restarts} restarts"
                f" without a finished step (rollout.server.max_restarts); {own.log_tail()}"
            )
        member.restarts += 1
        self._restarting.add(member.url)
        self._fleet.announce(f"starting the server at {own.url} again")
        threading.Thread(target=self._restart, args=(member, own), name="server-restart", daemon=True).start()

    def _restart(self, member: Member, own: SGLangServer) -> None:
        try:
            with self._gate.starting():
                own.restart()
                self._fleet.probe(member, strict=True)
            self._fleet.announce(f"the server at {own.url} is back; it gets the current weights next")
        except Exception as error:  # noqa: BLE001 - raised where the run waits
            self._fail(error)
        finally:
            self._restarting.discard(member.url)
