"""A process with a GPU that runs one function after another: importing everything for each takes longer than the tests.

It is started anew after a failure, since a fault in a kernel leaves CUDA unusable for the process.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from megatron_vespo.rollout.server import free_port
from tests.ranks import LOOPBACK, TIMEOUT


class Worker:
    """The only rank of a job. Functions, arguments and results must survive pickling."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive the fork that other tests use
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, free_port(LOOPBACK)), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` there.

        Raises:
            AssertionError: It raised; the message is its traceback.
            TimeoutError: It takes too long.
            EOFError: The process died.
        """
        self._connection.send_bytes(pickle.dumps((function, args)))
        if not self._connection.poll(TIMEOUT):
            raise TimeoutError(f"{function.__name__} did not finish in {TIMEOUT} s")
        succeeded, value = pickle.loads(self._connection.recv_bytes())
        if not succeeded:
            raise AssertionError(value)
        return value

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, port: int) -> None:
    environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    from megatron_vespo import parallel

    parallel.initialize({}, seed=1)
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            _begin_anew()
            answer = pickle.dumps((True, function(*args)))
        except BaseException:  # noqa: BLE001 - the parent raises it
            answer = pickle.dumps((False, traceback.format_exc()))
        connection.send_bytes(answer)


def _begin_anew() -> None:
    """Nothing of an earlier function stays but what is compiled."""
    import torch

    from megatron_vespo import parallel

    parallel.seed_random(1)
    gc.collect()
    if torch.cuda.is_available():
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
