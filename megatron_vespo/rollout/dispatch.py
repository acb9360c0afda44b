"""Sends requests to servers that may generate, and sends them again where one is lost on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from megatron_vespo.errors import UserError
from megatron_vespo.rollout.client import SGLangClient, TokenIds
from megatron_vespo.rollout.fleet import Fleet, Member, State
from megatron_vespo.rollout.protocol import Generation, ServerGoneError, ServerInfo, ServerTimeoutError, UnpushedError
from megatron_vespo.rollout.sampling import SamplingParams

RETRY_SECONDS = 0.2
# A router that fails so many requests in a row is gone itself.
MAX_ROUTER_FAILURES = 300


class LoadMeter:
    """How many requests are in flight over time; used in the event loop alone."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._since = self._began = time.monotonic()
        self._idle = self._area = 0.0

    def change(self, by: int) -> None:
        """A request begins (1) or ends (-1)."""
        self._book()
        self._in_flight += by

    def read(self) -> tuple[float, float]:
        """Mean number of requests in flight, and seconds without any, since the last call."""
        self._book()
        mean, idle = self._area / max(self._since - self._began, 1e-9), self._idle
        self._began, self._idle, self._area = self._since, 0.0, 0.0
        return mean, idle

    def _book(self) -> None:
        now = time.monotonic()
        self._area += self._in_flight * (now - self._since)
        self._idle += (now - self._since) * (self._in_flight == 0)
        self._since = now


class Dispatcher:
    """Generates on a fleet. Belongs to one event loop.

    Args:
        fleet: The servers.
        concurrency: Requests in flight at once on all of them; more wait here.
        router: Takes the requests in place of the servers, which it spreads them over.
        cache_by_version: Let a request find only prefixes that the current weights computed, where pushes do not flush
            the caches.
    """

    def __init__(
        self, fleet: Fleet, *, concurrency: int, router: SGLangClient | None = None, cache_by_version: bool = False
    ) -> None:
        self._cache_by_version = cache_by_version
        self.load = LoadMeter()
        self.resubmitted = 0
        self._fleet, self._router = fleet, router
        self._slots = asyncio.Semaphore(concurrency)
        self._loop: asyncio.AbstractEventLoop | None = None
        # Done when the server is lost: a request to one that hangs would otherwise be waited for.
        self._losses: dict[Member, asyncio.Future[None]] = {}
        fleet.listen(self._hear_of_loss)

    def route(self) -> Route:
        """For the requests of one group, whose prompt's KV cache is then computed once."""
        return Route(self)

    async def close(self) -> None:
        """Close all connections; requests in flight fail."""
        for client in [member.client for member in self._fleet.members] + [self._router]:
            if client is not None:
                await client.close()

    async def choose(self) -> Member:
        """A server that may generate, waited for."""
        while (member := self._fleet.choose()) is None:
            await asyncio.sleep(RETRY_SECONDS)
        return member

    async def send(
        self, member: Member, ids: TokenIds, sampling: SamplingParams, left: int, seed: int | None
    ) -> Generation:
        """One request to one server, or to the router in its place.

        Raises:
            ServerGoneError: It was lost; that has been noted, the request may be sent elsewhere.
            UserError: It cannot be answered.
        """
        life = member.lives
        async with self._slots:
            self.load.change(1)
            try:
                with member.busy():
                    cache_key = str(self._fleet.version) if self._cache_by_version else None
                    client = self._router or member.client
                    if self._router is not None and member.info is not None:
                        self._router.assume(member.info)
                    return await self._unless_lost(member, client.generate(ids, sampling, left, seed, cache_key))
            except ServerTimeoutError as error:
                if await asyncio.to_thread(member.control.health):
                    raise UserError(f"{error}; the server is well, so raise rollout.request_timeout") from error
                self._fleet.lost(member, life, str(error))
                raise
            except ServerGoneError as error:
                if self._router is None:
                    self._fleet.lost(member, life, str(error))
                raise
            finally:
                self.load.change(-1)

    async def _unless_lost(self, member: Member, request: Coroutine[Any, Any, Generation]) -> Generation:
        self._loop = asyncio.get_running_loop()
        loss = self._losses.setdefault(member, self._loop.create_future())
        task = asyncio.create_task(request)
        try:
            both: set[asyncio.Future[Any]] = {task, loss}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
        if not task.done():
            raise ServerGoneError(f"{member.url}: {member.reason}")
        return task.result()

    def _hear_of_loss(self, member: Member) -> None:
        """In any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._give_up, member)

    def _give_up(self, member: Member) -> None:
        loss = self._losses.pop(member, None)
        if loss is not None:
            loss.set_result(None)


class Route:
    """Requests of one group: to one server as long as that one lasts."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._member: Member | None = None

    async def generate(
        self, input_ids: TokenIds, sampling: SamplingParams, max_new_tokens: int | None = None, seed: int | None = None
    ) -> Generation:
        """As :meth:`SGLangClient.generate`, sent again from the start whenever its server is lost.

        Raises:
            UserError: The request cannot be answered, or the router is gone.
        """
        left = sampling.max_new_tokens if max_new_tokens is None else max_new_tokens
        failures = 0
        while True:
            member = await self._serving()
            try:
                return await self._dispatcher.send(member, input_ids, sampling, left, seed)
            except (ServerGoneError, UnpushedError) as error:
                # A router may have passed it to a worker that died, or to one that joined and has no weights yet.
                failures += 1
                if failures > MAX_ROUTER_FAILURES:
                    raise UserError(f"a request failed {failures} times, the last time with: {error}") from error
                self._dispatcher.resubmitted += 1
            await asyncio.sleep(RETRY_SECONDS)

    async def limits(self) -> ServerInfo:
        """What its server says of itself."""
        member = await self._serving()
        assert member.info is not None  # it was met before it could serve
        return member.info

    async def _serving(self) -> Member:
        if self._member is None or self._member.state is not State.SERVING:
            self._member = await self._dispatcher.choose()
        return self._member
