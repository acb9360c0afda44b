"""Policies that train, save and go on, and their whole state to compare."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_vespo.errors import UserError
from megatron_vespo.megatron_options import microbatch_multiple
from megatron_vespo.policy.checkpoints import Checkpoints
from megatron_vespo.policy.objectives import NextToken, denominators
from megatron_vespo.policy.policy import Policy, StepResult
from megatron_vespo.types import Sample
from tests.policies import make_plan, make_policy

State = dict[str, Any]
SCHEDULE = {"warmup_steps": 3, "decay_style": "cosine"}


def checkpoints_of(policy: Policy, folder: Path, **options: Any) -> Checkpoints:
    return Checkpoints(folder, policy, **{"keep": 2, "asynchronous": False, "seed": 1} | options)


def forward_backward(policy: Policy, samples: Sequence[Sample], megatron: dict[str, Any]) -> float:
    """Accumulate the gradient; the loss."""
    plan = make_plan(samples, 40, multiple_of=microbatch_multiple(megatron))
    return float(policy.forward_backward(samples, plan, NextToken(denominators(samples))).table["loss"].sum())


def update(policy: Policy, samples: Sequence[Sample], megatron: dict[str, Any]) -> tuple[float, StepResult]:
    """One update: loss, and what the step did."""
    return forward_backward(policy, samples, megatron), policy.optim_step()


def state_of(policy: Policy) -> State:
    """Weights, buffers, optimizer and schedule of this rank, copied."""
    state: State = {"scheduler": policy._scheduler.state_dict()}
    for number, chunk in enumerate(policy.chunks):
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            state[f"{number}.{name}"] = tensor.detach().clone()
    for number, part in enumerate(policy._optimizer.chained_optimizers):
        groups = part.optimizer.param_groups
        for key, group in enumerate(groups):
            state[f"optimizer {number}, group {key}"] = {name: group[name] for name in group if name != "params"}
        for key, param in enumerate(param for group in groups for param in group["params"]):
            state[f"optimizer {number}.{key}"] = param.detach().clone()
            for name, tensor in part.optimizer.state[param].items():
                state[f"optimizer {number}.{key}.{name}"] = tensor.clone()
    return state


def draw() -> State:
    """A number of every random stream."""
    with get_cuda_rng_tracker().fork():
        megatron = torch.rand(1).item()
    streams = {"python": random.random(), "numpy": np.random.rand(), "torch": torch.rand(1).item()}
    return streams | {"megatron": megatron}


def differences(ours: State, theirs: State) -> list[str]:
    """Names of what differs in a bit."""
    assert ours.keys() == theirs.keys()
    return [
        name
        for name, value in theirs.items()
        if not (torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value)
    ]


def train_and_save(
    model: Path, samples: Sequence[Sample], megatron: dict[str, Any], folder: Path, before: int = 2, after: int = 2
) -> tuple[State, list[float]]:
    """Train, save and go on without a break: the state at the end, and losses and grad norms after the save."""
    policy = make_policy(model, megatron, **SCHEDULE)
    for _ in range(before):
        update(policy, samples, megatron)
    draw()
    for part in policy._optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            if not group["params"]:
                del group["step"]  # as with Transformer Engine, which does not count them
    checkpoints_of(policy, folder).save(before, {"run_state": b"step 2", "empty": b""})
    return _go_on(policy, samples, megatron, after)


def load_and_go_on(
    model: Path, samples: Sequence[Sample], megatron: dict[str, Any], folder: Path, after: int = 2
) -> tuple[State, list[float]]:
    """The same in a process that knows the checkpoint alone."""
    policy = make_policy(model, megatron, **SCHEDULE)
    for chunk in policy.chunks:
        for tensor in chunk.state_dict().values():
            if tensor is not None:
                tensor.fill_(7)
    loaded = checkpoints_of(policy, folder).load(None)
    assert loaded.files == {"run_state": b"step 2", "empty": b""}
    return _go_on(policy, samples, megatron, after)


def _go_on(
    policy: Policy, samples: Sequence[Sample], megatron: dict[str, Any], steps: int
) -> tuple[State, list[float]]:
    figures = []
    for _ in range(steps):
        loss, result = update(policy, samples, megatron)
        figures += [loss, result.grad_norm]
    return state_of(policy) | draw(), figures


def message(function: Callable[[], Any]) -> str:
    """What the user is told, or nothing."""
    try:
        function()
    except UserError as error:
        return str(error)
    return ""


def save_three(model: Path, samples: list[Sample], folder: Path, megatron: dict[str, Any]) -> list[State]:
    """Checkpoints 1, 2 and 3 with what they hold."""
    policy = make_policy(model, megatron)
    checkpoints, states = checkpoints_of(policy, folder, keep=3), []
    for iteration in (1, 2, 3):
        update(policy, samples, megatron)
        checkpoints.save(iteration, {"run_state": b"%d" % iteration})
        states.append(state_of(policy))
    return states


def load(model: Path, folder: Path, iteration: int | None = None, megatron: dict[str, Any] | None = None) -> Any:
    """What is told, and the state and iteration after loading."""
    policy = make_policy(model, megatron or {})
    loaded = None

    def load() -> None:
        nonlocal loaded
        loaded = checkpoints_of(policy, folder).load(iteration)

    told = message(load)
    return told, loaded and loaded.iteration, state_of(policy)
