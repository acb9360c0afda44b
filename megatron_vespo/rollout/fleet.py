"""The servers of a run: which of them may generate, what weights they hold, who was lost and who came back.

A server is *serving* while it holds the weights pushed last, *waiting* while it answers but holds other weights (it was
started again, or joined: it generates after the next push), and *gone* while it does not answer. Requests go to serving
servers only; a push goes to all that are not gone. ``watch`` notices deaths, hangs and returns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from megatron_vespo.errors import UserError
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.protocol import UNPUSHED, ServerError, ServerGoneError, ServerInfo, ServerTimeoutError
from megatron_vespo.rollout.server import SGLangServer

POLL_SECONDS = 0.1
# So long may a process take to end after its connections broke.
DEATH_SECONDS = 5.0
# So long may one that was lost take to say that it is back: pushes wait meanwhile, and the next one asks again.
RETURN_SECONDS = 5.0


class State(StrEnum):
    """What a server may be used for."""

    SERVING = "serving"
    WAITING = "waiting"
    GONE = "gone"


@dataclass(eq=False)
class Member:
    """One server.

    Attributes:
        url: Its address.
        control: Its control routes, for threads.
        client: Its generation, for the event loop.
        state: What it may be used for.
        reason: Why it is gone.
        lives: How often it was lost: another life is another process, which is in no process group of ours.
        restarts: How often we started it again since the servers last did what they are for.
        info: What it said of itself when it was last met.
        in_flight: Requests that it has not answered.
        last_answer: When it answered one, or got one after none (monotonic clock).
    """

    url: str
    control: SGLangControl
    client: SGLangClient
    state: State = State.GONE
    reason: str = "it has not answered yet"
    lives: int = 0
    restarts: int = 0
    info: ServerInfo | None = None
    in_flight: int = 0
    last_answer: float = field(default_factory=time.monotonic)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count a request in flight; used in the event loop alone."""
        if not self.in_flight:
            self.last_answer = time.monotonic()
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self.last_answer = time.monotonic()


class Fleet:
    """All servers, on rank 0. Used by the event loop that generates, the thread that pushes and the one that watches.

    Args:
        addresses: Where the servers are now; read at every push, so that servers may join and leave.
        open_member: Control and client of an address.
        own: Servers that this process started, by address: ``watch`` starts them again. Others come back by themselves.
        check_info: Raises a UserError for a server that cannot be used in this run.
        balance: ``least_loaded`` or ``round_robin``.
        takes_pushes: Whether weights are pushed; otherwise a server generates with what it loaded.
        patience: Seconds to wait where no server answers at all.
        announce: Told what people should know.
    """

    def __init__(
        self,
        addresses: Callable[[], Sequence[str]],
        open_member: Callable[[str], tuple[SGLangControl, SGLangClient]],
        *,
        own: Mapping[str, SGLangServer] | None = None,
        check_info: Callable[[str, ServerInfo], None] = lambda url, info: None,
        balance: str = "least_loaded",
        takes_pushes: bool = True,
        patience: float = 600.0,
        announce: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.own = {} if own is None else own
        self.announce = announce
        self.failure: Exception | None = None
        self.pushing = False
        self.resting = False
        self.losses = 0
        self.version: int | None = None
        self._addresses, self._open_member, self._check_info = addresses, open_member, check_info
        self._least_loaded = balance == "least_loaded"
        self._takes_pushes, self._patience = takes_pushes, patience
        self._lock = threading.RLock()
        self._members: dict[str, Member] = {}
        self._lives: dict[str, int] = {}
        self._turn = 0
        self._listeners: list[Callable[[Member], None]] = []

    @property
    def members(self) -> list[Member]:
        """All servers, in the order in which they were named."""
        with self._lock:
            return list(self._members.values())

    def meet(self) -> list[ServerInfo]:
        """Read the addresses and get to know every server, at the start.

        Raises:
            UserError: No address, no server that answers, or one that cannot be used in this run.
        """
        self._read_addresses()
        for member in self.members:
            self.probe(member, strict=True)
        return [member.info for member in self.present() if member.info is not None]

    def choose(self) -> Member | None:
        """The server for the next group, in the event loop; None while none is serving."""
        serving = [member for member in self.members if member.state is State.SERVING]
        if not serving:
            return None
        self._turn += 1
        if self._least_loaded:
            return min(serving, key=lambda member: member.in_flight)
        return serving[self._turn % len(serving)]

    def lost(self, member: Member, life: int, reason: str) -> None:
        """A server does not answer. ``life`` is the one that the caller dealt with: news of an older one is no news."""
        with self._lock:
            if member.state is State.GONE or member.lives != life:
                return
            member.state, member.reason = State.GONE, reason
            member.lives += 1
            self.losses += 1
        for listener in self._listeners:
            listener(member)
        self.announce(f"lost the server at {member.url}: {reason}")

    def listen(self, listener: Callable[[Member], None]) -> None:
        """Call this for every server that is lost, in whatever thread that is noticed."""
        self._listeners.append(listener)

    def probe(self, member: Member, *, strict: bool = False) -> bool:
        """Ask a server that is gone whether it is back, and what weights it holds.

        Args:
            member: The server.
            strict: Whether one that cannot be used is an error; otherwise it stays gone, and that is announced.

        Raises:
            UserError: As said for ``strict``, or :class:`ServerError` where it does not answer.
        """
        try:
            info = member.control.info() if strict else member.control.info(RETURN_SECONDS)
            self._check_info(member.url, info)
        except UserError as error:
            if strict:
                raise
            if str(error) != member.reason and not isinstance(error, ServerError):
                self.announce(str(error))
            member.reason = str(error)
            return False
        with self._lock:
            member.info = info
            current = not self._takes_pushes or (self.version is not None and info.weight_version == str(self.version))
            member.state = State.SERVING if current else State.WAITING
            member.last_answer = time.monotonic()
        return True

    def needs_push(self) -> bool:
        """Whether nobody can generate until weights are pushed again: all that answer hold others."""
        states = {member.state for member in self.members}
        return self.version is not None and State.SERVING not in states and State.WAITING in states

    def check(self) -> None:
        """Raise the error for which the watch gave up, if it did: a UserError, or a mistake in this program."""
        if self.failure is not None:
            raise self.failure

    def progressed(self) -> None:
        """The servers did what they are for: earlier restarts are forgiven."""
        for member in self.members:
            member.restarts = 0

    def begin_push(self) -> list[Member]:
        """Who gets a push: all servers named now that answer, one at least. No hang is suspected until it ends.

        While the servers rest nobody is waited for, and there may be none.

        Raises:
            UserError: Nobody answers for ``patience`` seconds, or a server of ours could not be started again.
        """
        self._read_addresses()
        self.look()
        present = self.present() if self.resting else self.wait_present()
        self.pushing = True
        self._note_lives(present)
        return present

    def wait_present(self) -> list[Member]:
        """All servers that answer, as soon as one does. Raises as :meth:`begin_push`."""
        deadline = time.monotonic() + self._patience
        while not (present := self.present()):
            self.check()
            if time.monotonic() > deadline:
                reasons = "; ".join(f"{member.url}: {member.reason}" for member in self.members)
                raise UserError(f"no server answers since {self._patience:g} s: {reasons}")
            time.sleep(POLL_SECONDS)
        return present

    def look(self) -> None:
        """Ask those that are gone, and that nobody here starts again, whether they are back."""
        for member in self.members:
            if member.state is State.GONE and member.url not in self.own:
                self.probe(member)

    def rest(self) -> list[Member]:
        """Nobody is expected to answer requests, and no start is waited for; who answers now."""
        self.resting = True
        self.look()
        self._note_lives(present := self.present())
        return present

    def wake(self) -> None:
        """Requests are answered again."""
        with self._lock:
            self.resting = False
            for member in self._members.values():
                member.last_answer = time.monotonic()

    def end_push(self, pushed: Sequence[Member], version: int) -> None:
        """These servers hold ``version`` now, and nobody else does."""
        with self._lock:
            self.version = version
            for member in self._members.values():
                if member.state is not State.GONE:
                    member.state = State.SERVING if member in pushed else State.WAITING
                    member.last_answer = time.monotonic()
            self.pushing = False

    def find_lost(self, members: Sequence[Member], error: UserError) -> bool:
        """After something failed among these servers: note which of them are gone.

        Args:
            members: The servers.
            error: What failed. A connection that broke: whoever broke it may take a moment to be gone. No answer in
                time: the server hangs, whatever its front says.

        Returns:
            Whether any is gone, or has begun another life since the push began.
        """
        if isinstance(error, ServerTimeoutError):
            for member in members:
                if member.url == error.url:
                    self.lost(member, member.lives, f"it hangs: {error}")
        deadline = time.monotonic() + (DEATH_SECONDS if isinstance(error, ServerGoneError) else 0.0)
        while True:
            for member in members:
                life = member.lives
                if member.state is State.GONE:
                    continue
                if not member.control.alive():
                    self.lost(member, life, "it does not answer any more")
                elif self._forgot(member):
                    self.lost(member, life, "it was started again")
            if any(member.state is State.GONE or member.lives != self._lives.get(member.url) for member in members):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        """Close the control connections."""
        for member in self.members:
            member.control.close()

    def _note_lives(self, members: Sequence[Member]) -> None:
        """What is lost from now on is not of an earlier loss."""
        self._lives = {member.url: member.lives for member in members}

    def _forgot(self, member: Member) -> bool:
        """Whether a server that held our weights has its first ones: it died and came back while nobody looked."""
        if self.version is None or member.state is not State.SERVING:
            return False
        try:
            return member.control.info().weight_version == UNPUSHED
        except UserError:
            return False

    def present(self) -> list[Member]:
        """All servers that are not gone."""
        return [member for member in self.members if member.state is not State.GONE]

    def _read_addresses(self) -> None:
        urls = [url.rstrip("/") for url in self._addresses()]
        if not urls:
            raise UserError("no server addresses: name one in rollout.server.url, url_file or router")
        with self._lock:
            left = [url for url in self._members if url not in urls]
            for url in left:
                self.announce(f"the server at {url} leaves: it is named no more")
                del self._members[url]
            for url in urls:
                if url not in self._members:
                    self._members[url] = Member(url, *self._open_member(url))
