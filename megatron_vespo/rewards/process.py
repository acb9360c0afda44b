"""One worker process, seen from the pool's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO

import msgspec

from megatron_vespo.guard import guarded
from megatron_vespo.rewards.failures import shorten
from megatron_vespo.rewards.protocol import Answer, Frames, Mark, Ready, Setup, Term, encode

WORKER_MODULE = "megatron_vespo.rewards.worker"
# An import that takes longer will not end.
READY_SECONDS = 600.0
# The mark is read at least this often while a sample is scored.
WATCH_SECONDS = 1.0
# A sample that is neither marked nor answered gets twice its time and this on top: other samples may be in its way.
UNMARKED_SECONDS = 1.0
OUTPUT_LINES = 10

_answers = msgspec.msgpack.Decoder(Answer)
_readies = msgspec.msgpack.Decoder(Ready)


class WorkerNotReadyError(Exception):
    """A worker ended before it was ready; the message says why."""


@dataclass(slots=True, eq=False)
class Job:
    """A sample to be scored.

    Attributes:
        number: Of the request.
        request: The sample, as a frame.
        future: Gets the answer, which has a reward, or the reason why not.
        sent: time.monotonic() of when a worker got it.
        suspicions: Workers that were lost with this sample and others in them, without a sign of which it was.
    """

    number: int
    request: bytes
    future: Future[Answer]
    sent: float = 0.0
    suspicions: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether it must have a worker for itself, because twice is no accident."""
        return self.suspicions >= 2


@dataclass(frozen=True, slots=True)
class Loss:
    """The end of a worker that was ready.

    Attributes:
        reason: What happened, to follow the words "the sample".
        timed_out: It was killed because a sample took too long; otherwise it ended by itself.
        culprit: The sample whose code ran; None: it cannot be told.
    """

    reason: str
    timed_out: bool
    culprit: Job | None


class WorkerProcess(asyncio.Protocol):
    """A worker, from its start to its end. Everything happens in the event loop in which it was started.

    Args:
        terms: What it computes.
        timeout: Seconds that one sample may take.
        answered: Called with each answer and its sample.
        lost: Called once if it ends or must be killed after it was ready; its samples are still in ``jobs`` then.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        timeout: float,
        answered: Callable[[WorkerProcess, Job, Answer], None],
        lost: Callable[[WorkerProcess, Loss], None],
    ) -> None:
        self.jobs: dict[int, Job] = {}  # in flight, in the order in which they were sent
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._terms = terms
        self._timeout = timeout
        self._answered = answered
        self._lost = lost
        self._capacity = 0
        self._ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.notices: list[str] = []  # what people should know of the reward functions
        self._frames = Frames()
        self._last_mark = (0, 0.0)
        self._stopped = False

    def spawn(self) -> None:
        """Start the process.

        Raises:
            WorkerNotReadyError: the system refuses.
        """
        try:
            with contextlib.ExitStack() as of_the_worker:
                self._spawn(of_the_worker)
        except OSError as error:
            raise WorkerNotReadyError(f"no process can be started: {error}") from error

    def _spawn(self, of_the_worker: contextlib.ExitStack) -> None:
        self._socket, theirs = socket.socketpair()
        of_the_worker.callback(theirs.close)
        mark = Mark.create_file()
        of_the_worker.callback(os.close, mark)
        log = os.dup(2)
        of_the_worker.callback(os.close, log)
        self._mark = Mark(mark)
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in wait_ready
        descriptors = (theirs.fileno(), mark, log)
        command = [sys.executable, "-P", "-m", WORKER_MODULE, *map(str, descriptors)]
        self._process = subprocess.Popen(
            guarded(command, grace=0),  # no grace: a worker has nothing worth saving
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=descriptors,
            start_new_session=True,  # Ctrl-C at the terminal is for the trainer, which then closes the pool
        )

    async def wait_ready(self) -> None:
        """Connect to it and wait until it has imported the function.

        Raises:
            WorkerNotReadyError: it could not, or died before.
        """
        with self._output:
            ready = await self._connect()
            if ready.error:
                self.stop()
                raise WorkerNotReadyError(ready.error)
            sys.stderr.write(self._read_output())
        self._capacity, self.notices = ready.capacity, ready.notices
        self._watch()

    async def _connect(self) -> Ready:
        self._transport, _ = await asyncio.get_running_loop().create_connection(lambda: self, sock=self._socket)
        self._transport.write(encode(Setup(list(self._terms), sys.path, os.environ.get("PYTHONPATH"), self._timeout)))
        try:
            async with asyncio.timeout(READY_SECONDS):
                return await self._ready
        except TimeoutError:
            return Ready(error=f"it did not get ready in {READY_SECONDS:g} s; {self._tail()}")

    def has_room_for(self, job: Job) -> bool:
        """Whether this sample may be sent now."""
        if not self.jobs:
            return self._capacity > 0 and not self._stopped
        return len(self.jobs) < self._capacity and not job.is_alone and not next(iter(self.jobs.values())).is_alone

    def send(self, job: Job) -> None:
        """Have this sample scored."""
        job.sent = time.monotonic()
        self.jobs[job.number] = job
        self._transport.write(job.request)

    def stop(self) -> None:
        """Kill it and all that it started; ``ended`` is set when they are gone."""
        self._stopped = True
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)  # to the guard, which kills the others

    def data_received(self, data: bytes) -> None:
        """Frames, or parts of them."""
        for content in self._frames.feed(data):
            if self._stopped:
                return
            try:
                self._receive(content)
            except (msgspec.DecodeError, KeyError):
                self._lose("wrote into the connection of its process", culprit=self._marked())

    def _receive(self, content: bytes) -> None:
        if not self._ready.done():
            self._ready.set_result(_readies.decode(content))
            return
        answer = _answers.decode(content)
        self._answered(self, self.jobs.pop(answer.number), answer)

    def connection_lost(self, error: Exception | None) -> None:
        """The guard, which holds the connection too, is gone, and so every process below it."""
        status = self._process.wait()
        if not self._ready.done():
            self._ready.set_result(Ready(error=f"its process {_describe_status(status)}; {self._tail()}"))
        elif not self._stopped:
            self._lose(f"took its process down, which {_describe_status(status)}", culprit=self._marked())
        self._mark.close()
        self.ended.set_result(None)

    def _watch(self) -> None:
        """Kill the worker if a sample takes too long, else look again later."""
        if self._stopped:
            return
        mark, now = self._mark.read(), time.monotonic()
        # A mark is believed when it is seen for the second time: the first time it may be half written.
        is_believed = mark[0] in self.jobs and mark == self._last_mark
        self._last_mark = mark
        left = self._timeout - (now - mark[1]) if is_believed else self._timeout
        oldest = next((job.sent for job in self.jobs.values()), now)
        if left <= 0:
            self._lose(timeout_message(self._timeout), timed_out=True, culprit=self.jobs[mark[0]])
        elif now - oldest > 2 * self._timeout + UNMARKED_SECONDS:
            only = next(iter(self.jobs.values())) if len(self.jobs) == 1 else None
            self._lose(timeout_message(self._timeout), timed_out=True, culprit=only)
        else:
            asyncio.get_running_loop().call_later(min(left, self._timeout / 4, WATCH_SECONDS), self._watch)

    def _marked(self) -> Job | None:
        return self.jobs.get(self._mark.read()[0])

    def _lose(self, reason: str, *, timed_out: bool = False, culprit: Job | None) -> None:
        self.stop()
        if self._ready.done():  # otherwise it never began to work, and whoever waits for that hears of it
            self._lost(self, Loss(reason, timed_out, culprit))

    def _read_output(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def _tail(self) -> str:
        lines = [shorten(line) for line in self._read_output().splitlines() if line.strip()]
        return "\n  ".join(["the end of its output:", *lines[-OUTPUT_LINES:]]) if lines else "it printed nothing"


def timeout_message(timeout: float) -> str:
    """What is said of a sample that took too long."""
    return f"took longer than reward.timeout={timeout:g} s"


def _describe_status(status: int) -> str:
    """The guard's exit status, which is the worker's, in words."""
    number = status - 128
    if number in signal.valid_signals():
        more = ", out of memory perhaps" if number == signal.SIGKILL else ""
        return f"ended by {signal.Signals(number).name}{more}"
    return f"ended with exit status {status}"
