"""Our Adam is torch's, bit by bit, and is saved and restored with its step in the parameter groups."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_vespo.policy.adam import Adam

OPTIONS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-6}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (11,), (3, 2, 2))]


def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}, {"params": []}]


def gradients(steps: int, seed: int = 1) -> Iterator[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield [torch.randn(param.shape, generator=generator) for param in parameters()]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: list[list[torch.Tensor]]) -> None:
    for number, step in enumerate(steps):
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (number + 1)
        optimizer.step()


@pytest.mark.parametrize("decoupled", [True, False])
def test_it_is_torchs_bit_by_bit(decoupled: bool) -> None:
    ours, theirs, steps = parameters(), parameters(), list(gradients(12))
    train(Adam(groups(ours), adam_w_mode=decoupled, **OPTIONS), ours, steps)
    train((torch.optim.AdamW if decoupled else torch.optim.Adam)(groups(theirs), **OPTIONS), theirs, steps)
    for one, other, start in zip(ours, theirs, parameters(), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, start)


def test_it_goes_on_from_its_state() -> None:
    straight, steps = parameters(), list(gradients(6))
    optimizer = Adam(groups(straight), **OPTIONS)
    train(optimizer, straight, steps[:3])
    state = copy.deepcopy(optimizer.state_dict())
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in straight]
    other = Adam(groups(resumed), **OPTIONS)
    other.load_state_dict(state)
    assert [group["step"] for group in other.param_groups] == [3, 3, 3], "the empty group's too"
    assert all(values.keys() == {"exp_avg", "exp_avg_sq"} for values in other.state.values())
    train(optimizer, straight, steps[3:])
    train(other, resumed, steps[3:])
    assert all(torch.equal(one, two) for one, two in zip(straight, resumed, strict=True))


def test_a_parameter_without_gradient_stays() -> None:
    (param, *_) = parameters()
    Adam([{"params": [param]}], **OPTIONS).step()
    assert torch.equal(param, parameters()[0])
