"""Reward functions that do what they must not. The tests copy this file to task.py."""

import asyncio
import contextlib
import ctypes
import math  # noqa: F401 - for what is evaluated
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_vespo.types import Sample


def spin() -> None:
    while True:
        pass


def hang_deaf() -> None:
    """In C, with the interpreter's lock held and every signal ignored."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    ctypes.PyDLL(None).sleep(1000)


def fail() -> float:
    return {}["no such key"]


def leave() -> None:
    sys.exit(3)


def talk() -> None:
    sys.stdout.write("x" * 5_000_000 + "\n")
    sys.stderr.write("y" * 5_000_000 + "\n")
    os.write(1, b"z" * 100_000)


DEEDS = {
    "": lambda: None,
    "spin": spin,
    "sleep": lambda: time.sleep(1000),
    "nap": lambda: time.sleep(0.4),
    "deaf": hang_deaf,
    "raise": fail,
    "exit": leave,
    "_exit": lambda: os._exit(1),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: ctypes.string_at(0),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "print": talk,
    "fork": os.fork,
    "close": lambda: os.closerange(3, 100),
}


def misbehave(sample: Sample) -> float:
    """Do what the response says, then score its first token id."""
    DEEDS[sample.text]()
    return float(sample.response_ids[0])


class TensorLike:
    def __float__(self) -> float:
        return 1.0


def evaluate(sample: Sample) -> object:
    return eval(sample.text)


def is_whole(sample: Sample) -> bool:
    """Whether it is the sample of ``test_a_sample_arrives_whole``."""
    prompt = sample.prompt
    return (
        (prompt.index, prompt.input_ids.tolist(), prompt.label) == (7, [1, 2], "l")
        and prompt.metadata == {"a": [1, None, "é"]}
        and (sample.index, sample.text, sample.finish_reason) == (3, "text", "length")
        and (sample.response_ids.tolist(), sample.weight_versions.tolist()) == ([5], [2])
        and (sample.log_mu.dtype, sample.log_mu.tolist()) == ("float32", [-0.5])
    )


def leave_orphan(sample: Sample) -> float:
    """Start a grandchild in a session of its own that ignores SIGTERM."""
    subprocess.Popen(["setsid", "sh", "-c", "trap '' TERM; sleep 1000 & echo $! > grandchild; wait"])
    while not (Path("grandchild").exists() and Path("grandchild").read_text()):
        time.sleep(0.01)
    return 1.0


def awaitable(sample: Sample) -> object:
    return asyncio.sleep(0.01, result=2.0)


async def swallow() -> None:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)


async def remote(sample: Sample) -> float:
    """Misbehave in the middle of waiting for a judge."""
    await asyncio.sleep(0.05)
    match sample.text:
        case "spin":
            spin()
        case "await":
            await asyncio.sleep(1000)
        case "swallow":
            await swallow()
        case "raise":
            raise ValueError("no judge")
        case "timeout":
            raise TimeoutError("of the judge")
        case "exit":
            sys.exit(4)
        case "_exit":
            os._exit(1)
        case "thread":  # a crash with nobody's mark set
            threading.Timer(0.02, os._exit, [1]).start()
    await asyncio.sleep(0.05)
    return float(sample.response_ids[0])


class Judge:
    async def __call__(self, sample: Sample) -> float:
        return await remote(sample)


judge = Judge()
NOT_A_FUNCTION = 3
