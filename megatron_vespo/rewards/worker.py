"""The process in which a reward function runs: ``python -m megatron_vespo.rewards.worker SOCKET MARK LOG``.

SOCKET, MARK and LOG are inherited descriptors: of the connection to the pool, of the :class:`Mark`'s memory, and of
where output goes once the function is imported; until then the pool keeps standard output and error for its error
message. An ordinary function scores one sample at a time, in the main thread and without an event loop, so that it may
use signals and ``asyncio.run``. Imports are few: a killed worker is to be replaced in a tenth of a second.
"""

from __future__ import annotations

import inspect
import io
import os
import socket
import sys
from collections.abc import Iterator

import msgspec

from megatron_vespo.rewards.failures import describe_error
from megatron_vespo.rewards.loader import RewardFunction
from megatron_vespo.rewards.protocol import Answer, Frames, Mark, Ready, Setup, answer_with, decode_request, encode
from megatron_vespo.rewards.terms import is_coroutine_function, load_terms
from megatron_vespo.types import Sample

# Coroutines, such as requests to a remote judge, that one worker runs at once.
COROUTINES = 256
READ_BYTES = 1 << 18


def main(argv: list[str]) -> int:
    """Import the function and score samples until the pool hangs up."""
    descriptors = [int(text) for text in argv]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)  # not for what the reward function starts
    connection, mark, log = socket.socket(fileno=descriptors[0]), Mark(descriptors[1]), descriptors[2]
    frames = _receive(connection)
    setup = msgspec.msgpack.decode(next(frames), type=Setup)
    _adopt(setup)
    try:
        scoring = load_terms(setup.terms)
    except BaseException as error:  # noqa: BLE001 - the pool raises it
        connection.sendall(encode(Ready(error=describe_error(error))))
        return 1
    _redirect_output(log)
    function = scoring.function
    if is_coroutine_function(function):
        # Here, because asyncio takes as long to import as all the rest.
        from megatron_vespo.rewards import coroutines

        connection.sendall(encode(Ready(COROUTINES, notices=scoring.notices)))
        coroutines.serve(connection, mark, function, setup.timeout)
    else:
        connection.sendall(encode(Ready(1, notices=scoring.notices)))
        _serve(connection, frames, mark, function)
    return 0


def _receive(connection: socket.socket) -> Iterator[bytes]:
    frames = Frames()
    while data := connection.recv(READ_BYTES):
        yield from frames.feed(data)


def _adopt(setup: Setup) -> None:
    sys.path[:] = setup.sys_path
    # The pool changed it so that this module is found; what the function starts shall see the trainer's.
    if setup.pythonpath is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = setup.pythonpath


def _redirect_output(log: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    # A line is worth more at once than after the process was killed.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)


def _serve(connection: socket.socket, frames: Iterator[bytes], mark: Mark, function: RewardFunction) -> None:
    pid = os.getpid()
    for content in frames:
        number, sample = decode_request(content)
        mark.begin(number)
        answer = _score(function, number, sample)
        if os.getpid() != pid:
            os._exit(0)  # a child that the reward function forked and that came out of it
        mark.end()
        connection.sendall(encode(answer))


def _score(function: RewardFunction, number: int, sample: Sample) -> Answer:
    try:
        value = function(sample)
        if inspect.isawaitable(value):
            from megatron_vespo.rewards import coroutines

            value = coroutines.wait_for(value)
        return answer_with(number, value)
    except BaseException as error:  # noqa: BLE001 - whatever it raises, SystemExit included, costs one sample
        return Answer(number, None, describe_error(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
