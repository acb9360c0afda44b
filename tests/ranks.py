"""Run a function on several gloo ranks, forked from this process so that torch and Megatron are imported once."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_vespo import parallel
from megatron_vespo.rollout.server import free_port

TIMEOUT = 240
LOOPBACK = "127.0.0.1"


def _child(
    connection: Connection,
    rank: int,
    size: int,
    port: int,
    megatron: dict[str, Any] | None,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    import torch

    gc.freeze()  # what pytest has imported and collected stays: sweeps over it would be most of what a rank does
    torch.set_num_threads(1)
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in env.items()})
    try:
        if megatron is not None:
            parallel.initialize(megatron, seed=1, timeout_minutes=2)
        # Plain pickle: torch's own reduction would share memory with a process that is about to end.
        connection.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:  # noqa: BLE001 - the parent raises it
        connection.send_bytes(pickle.dumps((False, f"rank {rank}:\n{traceback.format_exc()}")))
    finally:
        connection.close()
        os._exit(0)  # neither the parent's pytest nor its atexit handlers may run here


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    initialize: bool = True,
    timeout: float = TIMEOUT,
    **megatron: Any,
) -> list[Any]:
    """``function(*args)`` on ``size`` ranks with this ``megatron:`` section; results in rank order.

    With ``initialize=False`` the function joins the job itself. ``timeout`` is in seconds.
    """
    context = multiprocessing.get_context("fork")
    port = free_port(LOOPBACK)
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_child, args=(theirs, rank, size, port, megatron if initialize else None, function, args)
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: dict[int, Any] = {}
    try:
        pending = {pipe: rank for rank, pipe in enumerate(pipes)}
        while pending:
            ready = wait(list(pending), timeout)
            if not ready:
                raise TimeoutError(f"ranks {sorted(pending.values())} did not finish in {timeout} s")
            for pipe in [pipe for pipe in pending if pipe in ready]:
                rank = pending.pop(pipe)
                succeeded, value = pickle.loads(pipe.recv_bytes())
                if not succeeded:
                    raise AssertionError(value)
                results[rank] = value
    finally:
        for process in processes:
            if len(results) < size:  # a rank failed: the others would wait for it
                process.kill()
            process.join()
    return [results[rank] for rank in range(size)]
