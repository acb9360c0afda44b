"""The counter must see every wait, and nothing else, or the tests that rest on it prove nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.host_syncs import count_host_syncs


def count(work: Callable[[], object]) -> int:
    with count_host_syncs() as syncs:
        work()
    return len(syncs)


X = torch.tensor([3.0, 1.0, 2.0])
MASK = X > 1.5
INDEX = torch.tensor([2, 0, 1])

WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: X.sum().item(),
    "bool": lambda: bool(MASK.any()),
    "if": lambda: 1 if MASK.any() else 0,
    "float": lambda: float(X[0]),
    "int": lambda: int(X[0]),
    "index of a list": lambda: [1, 2, 3][INDEX[1]],
    "range": lambda: range(INDEX[0]),
    "tensor as a slot": lambda: X[INDEX[0]],
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "asarray": lambda: np.asarray(X),
    "cpu": lambda: X.cpu(),
    "cpu, numpy": lambda: X.detach().cpu().numpy(),
    "cpu, tolist": lambda: X.cpu().tolist(),
    "many reads of one copy": lambda: [row.item() + float(row.sum()) for row in X.cpu().view(3, 1) * 2],
    "mask read": lambda: X[MASK],
    "mask read in a tuple": lambda: torch.eye(3)[:, MASK],
    "mask written": lambda: X.clone().__setitem__(MASK, X[0]),
    "nonzero": lambda: MASK.nonzero(as_tuple=True),
    "where": lambda: torch.where(MASK),
    "argwhere": lambda: torch.argwhere(MASK),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": lambda: X.unique(),
    "unique rows": lambda: torch.unique(torch.eye(3), dim=0),
    "unique_consecutive": lambda: torch.unique_consecutive(X),
    "bincount": lambda: torch.bincount(INDEX),
    "equal": lambda: torch.equal(X, X + 1),
    "allclose": lambda: torch.allclose(X, X + 1),
    "repeat_interleave": lambda: torch.repeat_interleave(X, INDEX),
    "inverse": lambda: torch.linalg.inv(torch.eye(3)),
    "print": lambda: repr(X),
}


@pytest.mark.parametrize("name", WAITS)
def test_each_wait_counts_once(name: str) -> None:
    assert count(WAITS[name]) == 1


def test_waits_add_up_and_say_where() -> None:
    with count_host_syncs() as syncs:
        first = X.cpu()
        X.sum().item()
        X.tolist()
        torch.stack([first, X]).tolist()  # not of the host's alone, so it is awaited
    assert len(syncs) == 4
    assert [event.partition(" at unit/test_host_syncs.py:")[0] for event in syncs.events] == [
        "cpu",
        "aten._local_scalar_dense.default",
        "tolist",
        "tolist",
    ]


@pytest.mark.parametrize(
    "work",
    [
        lambda: X.clone().masked_fill_(MASK, 0),
        lambda: torch.where(MASK, X, 0),
        lambda: X[INDEX] + X[0] + X[1:].sum(),
        lambda: X.clone().index_add_(0, INDEX, X).scatter_reduce_(0, INDEX, X, "amax"),
        lambda: X.clone().__setitem__(INDEX, X),
        lambda: torch.repeat_interleave(X, INDEX, output_size=3),
        lambda: X.repeat_interleave(2).sort().values.cumsum(0).topk(1),
        lambda: X.to(torch.float64).clone().copy_(X),
        lambda: X.isfinite().all() & (X == X).any(),
        lambda: (X.shape, X.numel(), len(X), X.dtype, X.is_cuda),
    ],
)
def test_work_that_nobody_waits_for_does_not_count(work: Callable[[], object]) -> None:
    assert count(work) == 0


def test_the_backward_pass_counts() -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * grad.sum().item()

    leaf = X.clone().requires_grad_()
    loss = Reads.apply(leaf).sum()
    assert count(loss.backward) == 1
    assert leaf.grad is not None and leaf.grad.tolist() == [3.0] * 3


def test_values_and_gradients_are_those_without_a_counter() -> None:
    leaf = X.clone().requires_grad_()
    with count_host_syncs():
        copy = leaf.cpu()
        copy.mul(2).sum().backward()
        assert copy.tolist() == X.tolist()
        assert X.cpu().add_(1).tolist() == [4.0, 2.0, 3.0]
    assert leaf.grad is not None and leaf.grad.tolist() == [2.0] * 3
    assert X.tolist() == [3.0, 1.0, 2.0]


def test_nothing_is_left_behind_after_an_error() -> None:
    before = (Tensor.cpu, Tensor.numpy, Tensor.tolist)
    with pytest.raises(ZeroDivisionError), count_host_syncs() as syncs:
        X.tolist()
        raise ZeroDivisionError
    X.tolist()
    X.sum().item()
    assert len(syncs) == 1
    assert (Tensor.cpu, Tensor.numpy, Tensor.tolist) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_only_its_tensors_count_and_every_copy_from_it() -> None:
    x = X.cuda()
    target = torch.empty(3)
    with count_host_syncs("cuda") as syncs:
        X.sum().item()
        X.tolist()
        X[MASK].unique().cuda()
        x.cpu().numpy()
        x.to("cpu").tolist()
        target.copy_(x)
        x.tolist()
        x[x > 1.5].sum().item()
    assert len(syncs) == 6, syncs.events
