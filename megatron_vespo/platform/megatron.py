"""Adaptations of Megatron-Core 0.19.2 that every device needs, each beside the upstream line that forces it."""

from __future__ import annotations

import queue
from typing import Any


def use_adam(adam: type[Any]) -> None:
    """Let Megatron's optimizers use this Adam where neither Transformer Engine's nor apex's is there.

    Megatron then takes it for apex's, whose arguments and state it must have: with torch's own, the distributed
    optimizer cannot be saved before its first step (optimizer/distrib_optimizer.py:839) nor restored (:1223).

    Args:
        adam: The class.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if optimizer.USING_PYTORCH_OPTIMIZER:  # optimizer/__init__.py:35
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = adam, False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True  # distrib_optimizer.py:20-35


def plan_saves_in_this_process() -> None:
    """Let Megatron plan a save without starting a process or talking about it.

    It makes a multiprocessing Manager, which imports ``__main__`` again, for results that another process would send
    (dist_checkpointing/strategies/filesystem_async.py:55); files are written by threads here. And it recommends another
    way of writing them (dist_checkpointing/strategies/torch.py:748).
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async, torch

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.SimpleQueue()
    torch._logged_mcore_async_deprecation = True
