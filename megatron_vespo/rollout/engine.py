"""Keeps the servers busy, on rank 0 only: draws prompts, samples groups in a background thread, hands them out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent import futures
from typing import Any

from megatron_vespo.data.prompts import PromptStream
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.generation import Decode, RewardFunction, gather_or_first_error, generate_group
from megatron_vespo.rollout.protocol import ServerGoneError
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import Prompt, SampleGroup

ProgressCallback = Callable[[int, int], None]

REPORT_SECONDS = 1.0
POLL_SECONDS = 0.1
# So long may a process take to end after its connections broke.
DEATH_SECONDS = 5.0


class RolloutEngine:
    """Runs the event loop that generates.

    Prompts are admitted as the buffer allows and sent to the servers in turn; groups are taken in order of admission.
    The first failure (a server, a reward function, a bad prompt) ends it: every later call raises that error.

    Args:
        clients: One for each server.
        prompts: Where prompts come from.
        buffer: Order and bound of admission.
        samples_per_prompt: Group size.
        sampling: How training samples are drawn.
        decode: Token ids to text.
        reward: Score of a sample.
        check_servers: Raises a UserError if a server process of ours is dead; asked every second while waiting.
        seed: Determines all samples, on servers with deterministic inference; None: requests without seeds.
        on_progress: Told (groups done, groups wanted) about every second while a caller waits, in the caller's thread.
    """

    def __init__(
        self,
        clients: Sequence[SGLangClient],
        prompts: PromptStream,
        buffer: RolloutBuffer,
        *,
        samples_per_prompt: int,
        sampling: SamplingParams,
        decode: Decode,
        reward: RewardFunction,
        check_servers: Callable[[], None] = lambda: None,
        on_progress: ProgressCallback = lambda done, total: None,
        seed: int | None = None,
    ) -> None:
        self._clients = clients
        self._prompts = prompts
        self._buffer = buffer
        self._samples_per_prompt = samples_per_prompt
        self._sampling = sampling
        self._decode = decode
        self._reward = reward
        self._check_servers = check_servers
        self._on_progress = on_progress
        self._seed = seed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        # What follows is touched in the event loop only, except for reading _done.
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._admitting = False
        self._failure: BaseException | None = None
        self._done = 0
        self._next_index = prompts.position

    def start(self) -> None:
        """Start the background thread and admit the first prompts. Weights must have been pushed before."""
        self._thread.start()
        self.resume()

    def pause(self) -> None:
        """Admit no more prompts. What is in flight goes on, or waits at a paused server."""
        self._call(self._set_admitting(False))

    def resume(self) -> None:
        """Admit prompts again."""
        self._call(self._set_admitting(True))

    def take(self, n: int) -> list[SampleGroup]:
        """Wait for the ``n`` oldest groups and hand them out, oldest first.

        Raises:
            UserError: generation or scoring failed, or a server died.
        """
        return self._wait(self._take(n), n)

    def release(self, n: int) -> None:
        """Let ``n`` more prompts in, after the weights trained on ``n`` groups taken have been pushed."""
        self._call(self._release(n))

    def evaluate(self, prompts: Sequence[Prompt], n: int, sampling: SamplingParams) -> list[SampleGroup]:
        """``n`` samples for each prompt, in their order, beside whatever else is in flight."""
        return self._wait(self._evaluate(prompts, n, sampling), len(prompts))

    def state_dict(self) -> dict[str, Any]:
        """State of the prompt stream from which a resumed run draws every prompt that was not taken yet."""
        return self._prompts.state_dict(self._next_index)

    def close(self) -> None:
        """Cancel what is in flight, close the connections and end the thread."""
        if not self._thread.is_alive():
            return
        self._call(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call[T](self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _wait[T](self, work: Coroutine[Any, Any, T], total: int) -> T:
        """Run it, report progress, and notice a dead server even if no connection says so."""
        self._done = 0
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not futures.wait([future], REPORT_SECONDS).done:
                self._on_progress(self._done, total)
                self._check_servers()
            result = future.result()
        except ServerGoneError:
            # A process that broke its connections is about to end, and its log says more than the connection.
            deadline = time.monotonic() + DEATH_SECONDS
            while time.monotonic() < deadline:
                self._check_servers()
                time.sleep(POLL_SECONDS)
            raise
        finally:
            future.cancel()
        self._on_progress(total, total)
        return result

    async def _take(self, n: int) -> list[SampleGroup]:
        if n > self._buffer.takeable:
            raise RuntimeError(f"{n} groups were asked for, {self._buffer.takeable} can be admitted before a release")
        while (done := self._buffer.count_ready(n)) < n:
            if self._failure is not None:
                raise self._failure
            self._done = done
            self._changed.clear()
            await self._changed.wait()
        groups = self._buffer.take(n)
        self._next_index = groups[-1].prompt.index + 1
        return groups

    async def _release(self, n: int) -> None:
        self._buffer.release(n)
        self._admit()

    async def _set_admitting(self, admitting: bool) -> None:
        self._admitting = admitting
        self._admit()

    def _admit(self) -> None:
        while self._admitting and self._failure is None and self._buffer.can_admit:
            prompt = next(self._prompts)
            self._buffer.admit(prompt)
            task = self._loop.create_task(self._produce(prompt))
            self._tasks.add(task)
            task.add_done_callback(self._finished)

    async def _produce(self, prompt: Prompt) -> None:
        self._buffer.complete(await self._generate(prompt, self._samples_per_prompt, self._sampling))

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
        self._changed.set()

    async def _evaluate(self, prompts: Sequence[Prompt], n: int, sampling: SamplingParams) -> list[SampleGroup]:
        async def one(prompt: Prompt) -> SampleGroup:
            group = await self._generate(prompt, n, sampling)
            self._done += 1
            return group

        return await gather_or_first_error([one(prompt) for prompt in prompts])

    async def _generate(self, prompt: Prompt, n: int, sampling: SamplingParams) -> SampleGroup:
        # One server for a group: its prompt's KV cache is computed once.
        client = self._clients[prompt.index % len(self._clients)]
        return await generate_group(client, prompt, n, sampling, self._decode, self._reward, self._seed)

    async def _shut_down(self) -> None:
        self._admitting = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients:
            await client.close()
