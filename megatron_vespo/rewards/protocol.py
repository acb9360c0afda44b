"""What the pool and its workers say to each other, in frames of MessagePack over a pair of sockets. No pickle.

    pool                        worker
    Setup                  ->
                           <-   Ready            once the reward function is imported
    request(number, sample) ->
                           <-   Answer           in any order

A frame is its length (four bytes) and its content. Beside the sockets a worker keeps a :class:`Mark` in shared memory,
which the pool can read while the worker hangs and after it died.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from megatron_vespo import codec
from megatron_vespo.rewards.failures import as_reward
from megatron_vespo.types import Sample, SampleGroup

LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Sum:
    """A reward that has parts.

    Attributes:
        reward: The weighted sum.
        terms: Each term's own value, without its weight, by its name.
    """

    reward: float
    terms: dict[str, float]


class Term(msgspec.Struct, frozen=True):
    """One of the rewards that are added up.

    Attributes:
        name: Of its metric; empty: it is the only one, and its value is the reward.
        function: As :func:`load_reward` reads it.
        weight: Its factor in the sum.
        params: Further arguments of the function, by name.
        sources: Patterns of the data sources that it is for; None: all.
    """

    name: str
    function: str
    weight: float = 1.0
    params: dict[str, Any] = {}
    sources: list[str] | None = None


class Setup(msgspec.Struct):
    """How the worker shall see the world.

    Attributes:
        terms: What it computes.
        sys_path: The trainer's ``sys.path``.
        pythonpath: The trainer's PYTHONPATH, for what the reward function starts; None: it has none.
        timeout: Seconds that one sample may take.
    """

    terms: list[Term]
    sys_path: list[str]
    pythonpath: str | None
    timeout: float


class Ready(msgspec.Struct):
    """The end of a worker's start.

    Attributes:
        capacity: Samples that the worker takes at a time.
        error: Why there is no function to call; the worker ends then.
        notices: What people should know of the functions.
    """

    capacity: int = 0
    error: str = ""
    notices: list[str] = []


class Answer(msgspec.Struct, array_like=True):
    """What became of a sample.

    Attributes:
        number: Of the request.
        reward: None: it could not be scored.
        error: Why not.
        timed_out: Whether that is because it took too long.
        terms: Values of the terms by name; empty where the reward is no sum.
    """

    number: int
    reward: float | None
    error: str = ""
    timed_out: bool = False
    terms: dict[str, float] = {}


def answer_with(number: int, value: object) -> Answer:
    """The answer that a reward function's result makes.

    Raises:
        RewardFailure: It is not one finite number, nor a sum of some.
    """
    return (
        Answer(number, value.reward, terms=value.terms) if isinstance(value, Sum) else Answer(number, as_reward(value))
    )


def frame(content: bytes) -> bytes:
    """The content with its length before it."""
    return LENGTH.pack(len(content)) + content


def encode(message: Setup | Ready | Answer) -> bytes:
    """The message as a frame."""
    return frame(msgspec.msgpack.encode(message))


def encode_request(number: int, sample: Sample) -> bytes:
    """The sample, whole, as a frame.

    Raises:
        UserError: its prompt's metadata holds something that is not JSON-like.
    """
    return frame(codec.pack([number, codec.to_rows([SampleGroup(sample.prompt, [sample])])]))


def decode_request(content: bytes) -> tuple[int, Sample]:
    """Number and sample of a request."""
    number, rows = codec.unpack(content, tuple[int, list[Any]])
    return number, codec.from_rows(rows)[0].samples[0]


class Frames:
    """Puts frames together from whatever pieces a socket gives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The contents of the frames that ``data`` completes."""
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            content = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            yield content


class Mark:
    """Which sample's code a worker is running, and since when.

    Args:
        descriptor: Of a memory file made by :meth:`create_file`.
    """

    _NUMBER = struct.Struct("=q")
    _SINCE = struct.Struct("=d")
    _SIZE = _NUMBER.size + _SINCE.size

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, self._SIZE)

    @classmethod
    def create_file(cls) -> int:
        """Descriptor of a new file in memory, for the pool and one worker."""
        descriptor = os.memfd_create("reward-worker")
        os.truncate(descriptor, cls._SIZE)
        return descriptor

    def begin(self, number: int) -> None:
        """The code of this request's sample (numbers start at 1) runs from now on."""
        # The time first: whoever reads a number reads no older time with it.
        self._SINCE.pack_into(self._memory, self._NUMBER.size, time.monotonic())
        self._NUMBER.pack_into(self._memory, 0, number)

    def end(self) -> None:
        """No sample's code runs."""
        self._NUMBER.pack_into(self._memory, 0, 0)

    def read(self) -> tuple[int, float]:
        """Number (0: none) and the time.monotonic() of its begin, a clock that all processes share."""
        return self._NUMBER.unpack_from(self._memory, 0)[0], self._SINCE.unpack_from(self._memory, self._NUMBER.size)[0]

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
