"""A worker's event loop: reward functions that are coroutines, many at a time."""

from __future__ import annotations

import asyncio
import os
import socket
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

from megatron_vespo.rewards.failures import describe_error
from megatron_vespo.rewards.protocol import LENGTH, Answer, Mark, answer_with, decode_request, encode
from megatron_vespo.types import Sample

# Kept, so that what an ordinary function's awaitables share, such as connections, stays in one event loop.
_runner = asyncio.Runner()


def wait_for[T](awaitable: Awaitable[T]) -> T:
    """The result of an awaitable that an ordinary function returned."""

    async def wait() -> T:
        return await awaitable

    return _runner.run(wait())


def serve(
    connection: socket.socket, mark: Mark, function: Callable[[Sample], Coroutine[Any, Any, Any]], timeout: float
) -> None:
    """Score samples as they come until the pool hangs up.

    Args:
        connection: To the pool.
        mark: Set to a sample while its coroutine runs, and to none while the event loop waits.
        function: A coroutine function.
        timeout: Seconds after which a sample's coroutine is cancelled.
    """
    asyncio.run(_serve(connection, mark, function, timeout))


async def _serve(
    connection: socket.socket, mark: Mark, function: Callable[[Sample], Coroutine[Any, Any, Any]], timeout: float
) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    tasks: set[asyncio.Task[None]] = set()

    async def one(number: int, sample: Sample) -> None:
        pid, clock = os.getpid(), asyncio.timeout(timeout)
        try:
            async with clock:
                answer = answer_with(number, await _marked(function(sample), mark, number))
        except BaseException as error:  # noqa: BLE001 - whatever it raises costs one sample
            timed_out = isinstance(error, TimeoutError) and clock.expired()
            answer = Answer(number, None, describe_error(error), timed_out)
        if os.getpid() != pid:
            os._exit(0)  # a child that the reward function forked and that came out of it
        writer.write(encode(answer))

    try:
        while True:
            length = LENGTH.unpack(await reader.readexactly(LENGTH.size))[0]
            task = asyncio.create_task(one(*decode_request(await reader.readexactly(length))))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
    except asyncio.IncompleteReadError:
        return


@types.coroutine
def _marked[T](coroutine: Coroutine[Any, Any, T], mark: Mark, number: int) -> Generator[Any, Any, T]:
    """Await the coroutine, with the mark on its sample whenever it runs: whoever hangs or crashes is then known."""
    step: Callable[[Any], Any] = coroutine.send
    value: Any = None
    while True:
        mark.begin(number)
        try:
            awaited = step(value)
        except StopIteration as stop:
            return stop.value
        finally:
            mark.end()
        try:
            value, step = (yield awaited), coroutine.send
        except BaseException as error:  # noqa: BLE001 - a cancellation, for the coroutine
            value, step = error, coroutine.throw
