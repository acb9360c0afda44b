"""Adaptations of Megatron-Core 0.19.2 that every device needs, each beside the upstream line that forces it."""

from __future__ import annotations

import queue
import sys
from typing import Any

import torch

# What Megatron's timers can write to (timers.py:13, :18). Here rank 0 writes metrics, by sinks of its own.
_TRACKERS = ("wandb", "torch.utils.tensorboard")


def import_without_trackers() -> None:
    """Import Megatron-Core without the trackers, half a second on every rank that no rank needs."""
    absent = [name for name in _TRACKERS if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type] # None: it is not there
    try:
        import megatron.core.timers  # noqa: F401
    finally:
        for name in absent:
            del sys.modules[name]


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


def keep_bucket_padding(optimizer: Any) -> None:
    """Let what a distributed optimizer gathers for a checkpoint lie where its table of parameters says it does.

    Buckets are padded, and the table counts the padding; the gathered state leaves it out between them
    (optimizer/distrib_optimizer.py, get_parameter_state_dp_zero). Where there are several buckets, as with
    ``overlap_grad_reduce``, and one but the last is padded, everything behind it is saved under another parameter's
    name. Sizes of large models are multiples of 128 and need no padding, except for such numbers of ranks as 6.

    Args:
        optimizer: A DistributedOptimizer, changed in place.
    """
    gather = optimizer.get_parameter_state_dp_zero

    def gather_padded(*args: Any, **kwargs: Any) -> Any:
        state = gather(*args, **kwargs)
        for number, buffer in enumerate(optimizer.buffers if state is not None else ()):
            for tensors in state[number].values():
                for name, value in tensors.items():
                    if isinstance(value, torch.Tensor):
                        tensors[name] = _with_padding(value, buffer)
        return state

    optimizer.get_parameter_state_dp_zero = gather_padded


def _with_padding(gathered: torch.Tensor, buffer: Any) -> torch.Tensor:
    padded = gathered.new_zeros(buffer.numel)
    parts = gathered.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, part in zip(buffer.buckets, parts, strict=True):
        padded[bucket.offset : bucket.offset + len(part)] = part
    return padded


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
