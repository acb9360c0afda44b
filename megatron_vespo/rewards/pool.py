"""Reward functions in worker processes: one that hangs or crashes costs one sample, and never the run."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from megatron_vespo.errors import UserError
from megatron_vespo.rewards.failures import RewardCounts, RewardFailure
from megatron_vespo.rewards.process import Job, Loss, WorkerNotReadyError, WorkerProcess, timeout_message
from megatron_vespo.rewards.protocol import Answer, Term, encode_request
from megatron_vespo.types import Sample

# Starts in a row that may fail until the pool gives up.
MAX_STARTS = 3
CLOSE_SECONDS = 10.0


class RewardPool:
    """Scores samples in worker processes that are killed and replaced when a sample hangs or crashes them.

    An ordinary function gets one sample at a time in each worker, a coroutine function many. Samples are handed out in
    the order in which they came. One that waits, or is in a worker beside another one that takes it down, is scored
    elsewhere. Which one is to blame says the worker's mark; where it says nothing (a thread of the function crashed,
    the kernel killed the process), all are tried again, from the third time on one by one.

    Everything happens in an event loop of the pool's own, in a thread of its own, so that a busy caller delays nobody.

    Args:
        reward: The reward function, as :func:`load_reward` reads it, or several to be added up; relative paths start at
            the current folder.
        workers: Processes.
        timeout: Seconds that scoring one sample may take, from when a worker begins with it.
    """

    def __init__(self, reward: str | Sequence[Term], *, workers: int, timeout: float) -> None:
        self._terms = [Term("", reward)] if isinstance(reward, str) else list(reward)
        self._spec = " + ".join(term.name or term.function for term in self._terms)
        self._notices: list[str] = []
        self._n_workers = workers
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._numbers = itertools.count(1)
        # Held while a sample is handed over, so that none comes after the pool was closed.
        self._lock = threading.Lock()
        self._is_open = False
        self._counts_read = RewardCounts()
        # What follows is touched in the event loop only, except for reading _counts.
        self._counts = RewardCounts()
        self._queue: deque[Job] = deque()
        self._workers: set[WorkerProcess] = set()
        self._starting: set[asyncio.Task[None]] = set()
        self._refusal: Exception | None = None

    def start(self) -> None:
        """Start the workers and wait until each has imported the function.

        Raises:
            UserError: The function cannot be imported; says why.
        """
        if self._thread is not None:
            raise RuntimeError("the reward pool was started already")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="rewards", daemon=True)
        self._thread.start()
        self._is_open = True
        try:
            self._call(self._start())
        except WorkerNotReadyError as error:
            self.close()
            raise UserError(f"reward function {self._spec} cannot be used: {error}") from None
        except BaseException:
            self.close()
            raise

    async def score(self, sample: Sample) -> float:
        """The sample's reward. May be called any number of times at once.

        Where the reward is a sum, the values of its terms are put into ``sample.reward_terms``.

        Raises:
            RewardFailure: This sample could not be scored.
            UserError: Its prompt's metadata cannot be sent, or workers cannot be started any more.
        """
        job = Job(next(self._numbers), b"", Future())
        job.request = encode_request(job.number, sample)
        with self._lock:
            if not self._is_open:
                raise RuntimeError("the reward pool was not started, or was closed")
            self._loop.call_soon_threadsafe(self._enqueue, job)
        answer = await asyncio.wrap_future(job.future)
        assert answer.reward is not None  # otherwise the future raises
        sample.reward_terms = answer.terms
        return answer.reward

    def take_counts(self) -> RewardCounts:
        """What became of samples since the last call."""
        now, before = replace(self._counts), self._counts_read
        self._counts_read = now
        return now.since(before)

    def close(self) -> None:
        """Kill all workers and everything that they started. Samples not scored yet raise. May be called again."""
        with self._lock:
            was_open, self._is_open = self._is_open, False
        if was_open:
            self._call(self._shut_down())
            self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not None:
            self._thread.join()  # for a second caller too: nothing runs any more when it returns

    def _run_loop(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _call[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self) -> None:
        await asyncio.gather(*(self._begin(self._start_worker()) for _ in range(self._n_workers)))

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._starting.add(task)
        task.add_done_callback(self._started)
        return task

    def _started(self, task: asyncio.Task[None]) -> None:
        self._starting.discard(task)
        error = task.exception()
        # What nobody reckoned with must not leave samples waiting for ever.
        if isinstance(error, Exception) and not isinstance(error, WorkerNotReadyError):
            self._refuse(error)

    async def _start_worker(self) -> None:
        if self._refusal is not None:
            raise WorkerNotReadyError(str(self._refusal))
        worker = WorkerProcess(self._terms, self._timeout, self._answered, self._lost)
        worker.spawn()
        self._workers.add(worker)
        worker.ended.add_done_callback(lambda _: self._workers.discard(worker))
        await worker.wait_ready()
        self._tell(worker.notices)

    def _tell(self, notices: Sequence[str]) -> None:
        """Tell people, once: every worker says the same."""
        for notice in notices:
            if notice not in self._notices:
                self._notices.append(notice)
                sys.stderr.write(f"{notice}\n")

    async def _replace_worker(self) -> None:
        for attempt in range(1, MAX_STARTS + 1):
            try:
                await self._start_worker()
            except WorkerNotReadyError as error:
                if self._refusal is not None:
                    return
                if attempt == MAX_STARTS:
                    message = f"reward function {self._spec}: its process cannot be started again: {error}"
                    self._refuse(UserError(message))
            else:
                self._counts.restarts += 1
                self._dispatch()
                return

    def _refuse(self, refusal: Exception) -> None:
        """End all workers, and raise this for every sample that is not scored yet and for those to come."""
        self._refusal = refusal
        for worker in self._workers:
            worker.stop()
            for job in worker.jobs.values():
                _settle(job, refusal)
            worker.jobs.clear()
        for job in self._queue:
            _settle(job, refusal)
        self._queue.clear()

    def _enqueue(self, job: Job) -> None:
        if self._refusal is not None:
            _settle(job, self._refusal)
            return
        self._queue.append(job)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue:
            job = self._queue[0]
            free = [worker for worker in self._workers if worker.has_room_for(job)]
            if not free:
                return
            self._queue.popleft()
            if not job.future.cancelled():
                min(free, key=lambda worker: len(worker.jobs)).send(job)

    def _answered(self, worker: WorkerProcess, job: Job, answer: Answer) -> None:
        if answer.reward is not None:
            self._counts.scored += 1
            _settle(job, answer)
        elif answer.timed_out:
            self._counts.timed_out += 1
            _settle(job, RewardFailure(timeout_message(self._timeout)))
        else:
            self._counts.failed += 1
            _settle(job, RewardFailure(answer.error))
        self._dispatch()

    def _lost(self, worker: WorkerProcess, loss: Loss) -> None:
        jobs = list(worker.jobs.values())
        worker.jobs.clear()
        culprit = loss.culprit
        if culprit is None:
            for job in jobs:
                if job.is_alone:
                    culprit = job
                job.suspicions += 1
        if culprit is not None:
            jobs.remove(culprit)
            if loss.timed_out:
                self._counts.timed_out += 1
            else:
                self._counts.crashed += 1
            _settle(culprit, RewardFailure(loss.reason))
        # They came before all that wait.
        self._queue.extendleft(reversed(jobs))
        self._begin(self._replace_worker())
        self._dispatch()

    async def _shut_down(self) -> None:
        self._refuse(RuntimeError("the reward pool was closed"))
        ends = [worker.ended for worker in self._workers]
        await asyncio.gather(*self._starting, return_exceptions=True)
        if ends:
            await asyncio.wait(ends, timeout=CLOSE_SECONDS)


def _settle(job: Job, result: Answer | Exception) -> None:
    if not job.future.set_running_or_notify_cancel():
        return  # whoever asked was cancelled
    if isinstance(result, Exception):
        job.future.set_exception(result)
    else:
        job.future.set_result(result)
