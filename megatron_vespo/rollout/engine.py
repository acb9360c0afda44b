"""Keeps the servers busy, on rank 0 only: draws prompts, samples groups in a background thread, hands them out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

from megatron_vespo.data.prompts import PromptStream
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.conversation import Decode, TurnSettings
from megatron_vespo.rollout.dispatch import Dispatcher
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.generation import Scorer, gather_or_first_error, generate_group
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.state import Held, RolloutState, decode_state, encode_state
from megatron_vespo.types import Prompt, Sample, SampleGroup

ProgressCallback = Callable[[int, int], None]

REPORT_SECONDS = 0.5


class WeightsNeeded(Exception):
    """No server holds the current weights, and one at least waits for them: push them, then go on."""


class Stopped(Exception):
    """The run shall end; nothing was taken."""


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """How training groups are made.

    Attributes:
        samples_per_prompt: Group size.
        sampling: How training samples are drawn.
        decode: Token ids to text.
        seed: Determines all samples, on servers with deterministic inference; None: requests without seeds.
        filter_equal: Most groups of a batch that are dropped because their rewards are all equal.
        turns: How a response is made of turns; None: of one.
    """

    samples_per_prompt: int
    sampling: SamplingParams
    decode: Decode
    seed: int | None = None
    filter_equal: int = 0
    turns: TurnSettings | None = None


class RolloutEngine:
    """Runs the event loop that generates.

    Prompts are admitted as the buffer allows and sent to the servers that may generate; batches are taken as the buffer
    says. The first error that no server's loss explains ends it: every later call raises that error.

    Args:
        fleet: The servers.
        dispatcher: Sends requests to them.
        prompts: Where prompts come from.
        buffer: Order and bound of admission.
        scorer: Scores samples.
        settings: How training groups are made.
        check_batch: Raises a UserError for a batch that cannot be trained on.
        sampled_under: Settings by name without which saved samples are of no use to a resumed run.
        ahead: Whether to generate before a batch is asked for. Otherwise nothing is in flight but while somebody waits
            for a batch or an evaluation.
        stop_requested: Whether the run shall end; asked while waiting for a batch or an evaluation.
        announce: Told what people should know.
        on_progress: Told (groups done, groups wanted) while a caller waits, in the caller's thread.
    """

    def __init__(
        self,
        fleet: Fleet,
        dispatcher: Dispatcher,
        prompts: PromptStream,
        buffer: RolloutBuffer,
        scorer: Scorer,
        settings: GroupSettings,
        *,
        check_batch: Callable[[Sequence[Sample]], None] = lambda samples: None,
        sampled_under: Mapping[str, Any] | None = None,
        ahead: bool = True,
        stop_requested: Callable[[], bool] = lambda: False,
        announce: Callable[[str], None] = lambda text: None,
        on_progress: ProgressCallback = lambda done, total: None,
    ) -> None:
        self._fleet, self._dispatcher = fleet, dispatcher
        self._prompts, self._buffer, self._scorer, self._settings = prompts, buffer, scorer, settings
        self._check_batch = check_batch
        self._sampled_under, self._ahead = dict(sampled_under or {}), ahead
        self._stop_requested, self._announce, self._on_progress = stop_requested, announce, on_progress
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        # What follows is touched in the event loop only, except for reading _done.
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._finished: dict[int, list[Sample]] = {}
        self._changed = asyncio.Event()
        self._started = False
        self._failure: BaseException | None = None
        self._done = 0
        self._dropped = self._restarted = self._filtered = 0

    def start(self) -> None:
        """Start the background thread and admit the first prompts. Weights must have been pushed before."""
        self._thread.start()
        if self._ahead:
            self._call(self._send_all())

    def take(self) -> list[SampleGroup]:
        """Wait for a batch and hand it out, in order of admission.

        Raises:
            UserError: Generation failed, the servers were lost for good, or too much could not be scored.
            WeightsNeeded: Before anything was taken.
            Stopped: Before anything was taken.
        """
        if not self._ahead:
            self._call(self._send_all())
        self._wait(self._wait_ready(), self._buffer.groups_per_batch)
        self._fleet.progressed()
        groups = self._call(self._take())
        self._check_batch([sample for group in groups for sample in group.samples])
        return groups

    def release(self) -> None:
        """Let further prompts in, after the weights trained on the batch taken have been pushed."""
        self._call(self._release())

    def evaluate(self, prompts: Sequence[Prompt], n: int, sampling: SamplingParams) -> list[SampleGroup]:
        """``n`` samples for each prompt, in their order, beside whatever else is in flight. Raises as :meth:`take`."""
        return self._wait(self._evaluate(prompts, n, sampling), len(prompts))

    def metrics(self) -> dict[str, float | None]:
        """What happened since the last call, by the names of metrics."""
        return self._call(self._read_metrics())

    def state(self) -> bytes:
        """What a resumed run goes on with: the first prompt not drawn, and all that is in flight or waits."""
        return encode_state(self._call(self._read_state()), self._sampled_under)

    def restore(self, data: bytes) -> None:
        """Go on with a saved state; call it before :meth:`start`.

        Raises:
            UserError: It was saved with other data, seed or shuffling, or is damaged.
        """
        state, changed = decode_state(data, self._sampled_under, self._buffer.max_staleness)
        if changed and state.held:
            self._announce(
                f"{len(state.held)} prompts in flight are sampled anew, as settings differ: {', '.join(changed)}"
            )
        self._prompts.load_state_dict(state.prompts)
        self._buffer.restore([held.entry for held in state.held])
        self._finished = {held.entry.prompt.index: held.finished for held in state.held}

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
        """Run what takes nothing away when it is cancelled; report progress, and notice what no request tells."""
        self._done = 0
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            while not futures.wait([future], REPORT_SECONDS).done:
                self._on_progress(self._done, total)
                self._fleet.check()
                if self._stop_requested():
                    raise Stopped
                if self._fleet.needs_push():
                    raise WeightsNeeded
            result = future.result()
        finally:
            future.cancel()
        self._on_progress(total, total)
        return result

    async def _send_all(self) -> None:
        """Send what is admitted and not under way, then as many more prompts as there is room for."""
        self._started = True
        for entry in self._buffer.entries():
            if entry.group is None and entry.prompt.index not in self._tasks:
                self._send(entry.prompt)
        self._admit()

    async def _wait_ready(self) -> None:
        while not self._buffer.ready:
            if self._failure is not None:
                raise self._failure
            self._done = self._buffer.count_ready()
            self._changed.clear()
            await self._changed.wait()

    async def _take(self) -> list[SampleGroup]:
        groups, late = self._buffer.take()
        for entry in late:
            self._finished.pop(entry.prompt.index, None)
            if task := self._tasks.get(entry.prompt.index):
                task.cancel()
                await asyncio.wait([task])  # its prompt may be sent again at once
        for group in groups:
            self._finished.pop(group.prompt.index, None)
        self._restarted += len(late)
        self._filtered = 0
        return groups

    async def _release(self) -> None:
        self._buffer.release()
        if self._ahead:
            await self._send_all()

    def _admit(self) -> None:
        while self._started and self._failure is None and self._buffer.can_admit:
            prompt = next(self._prompts)
            self._buffer.admit(prompt)
            self._send(prompt)

    def _send(self, prompt: Prompt) -> None:
        task = self._loop.create_task(self._produce(prompt))
        self._tasks[prompt.index] = task
        task.add_done_callback(lambda task: self._ended(prompt.index, task))

    async def _produce(self, prompt: Prompt) -> None:
        settings = self._settings
        finished = self._finished.setdefault(prompt.index, [])
        group = await generate_group(
            self._dispatcher.route(),
            prompt,
            settings.samples_per_prompt,
            settings.sampling,
            settings.decode,
            self._scorer,
            settings.seed,
            finished,
            turns=settings.turns,
        )
        if self._filtered < settings.filter_equal and group.has_equal_rewards:
            self._buffer.drop(prompt.index)
            del self._finished[prompt.index]
            self._filtered += 1
            self._dropped += 1
            self._admit()
        else:
            self._buffer.finish(group)

    def _ended(self, index: int, task: asyncio.Task[None]) -> None:
        if self._tasks.get(index) is task:
            del self._tasks[index]
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
        self._changed.set()

    async def _evaluate(self, prompts: Sequence[Prompt], n: int, sampling: SamplingParams) -> list[SampleGroup]:
        settings = self._settings

        async def one(prompt: Prompt) -> SampleGroup:
            route = self._dispatcher.route()
            group = await generate_group(
                route,
                prompt,
                n,
                sampling,
                settings.decode,
                self._scorer,
                settings.seed,
                turns=settings.turns,
            )
            self._done += 1
            return group

        return await gather_or_first_error([one(prompt) for prompt in prompts])

    async def _read_metrics(self) -> dict[str, float | None]:
        in_flight, idle = self._dispatcher.load.read()
        values: dict[str, float | None] = {
            "perf/in_flight_mean": in_flight,
            "perf/rollout_idle_time": idle,
            "perf/buffered_groups": float(self._buffer.complete),
            "perf/resubmitted_requests": float(self._dispatcher.resubmitted),
            "perf/server_losses": float(self._fleet.losses),
            "rollout/dropped_groups": float(self._dropped),
            "rollout/restarted_groups": float(self._restarted),
        }
        self._dispatcher.resubmitted = self._fleet.losses = self._dropped = self._restarted = 0
        return values

    async def _read_state(self) -> RolloutState:
        held = [Held(entry, list(self._finished.get(entry.prompt.index, []))) for entry in self._buffer.entries()]
        return RolloutState(self._prompts.state_dict(), held)

    async def _shut_down(self) -> None:
        self._started = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._dispatcher.close()
