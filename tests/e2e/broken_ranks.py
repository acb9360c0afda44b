"""Reductions that are left out from now on, in this process."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from megatron_vespo import parallel
from megatron_vespo.policy.policy import Policy


def replace_attribute(owner: Any, name: str, value: Any) -> None:
    """Like setattr, but there must be something to replace."""
    getattr(owner, name)
    setattr(owner, name, value)


def keep_replicas_out_of_the_loss() -> None:
    """The loss is not multiplied by the number of replicas that Megatron divides the gradient by."""
    forward_backward, size = Policy.forward_backward, parallel.data_parallel_size

    def broken(self: Policy, *args: Any) -> Any:
        replace_attribute(parallel, "data_parallel_size", lambda: 1)
        try:
            return forward_backward(self, *args)
        finally:
            replace_attribute(parallel, "data_parallel_size", size)

    replace_attribute(Policy, "forward_backward", broken)


def keep_norm_gradients_apart() -> None:
    """Norm weights keep the gradient of this rank's part of the sequence."""
    # The package has a function of the module's name.
    module = import_module("megatron.core.distributed.finalize_model_grads")
    replace_attribute(module, "_allreduce_non_tensor_model_parallel_grads", lambda *args, **kwargs: None)


def keep_samples_apart() -> None:
    """Every rank has the figures of its own samples only."""
    replace_attribute(parallel, "all_reduce_sum", lambda tensor: tensor)
