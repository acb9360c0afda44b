"""The log-prob head on a GPU: the cases of its unit tests, a larger vocabulary, memory, and no waiting."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_vespo import platform
from megatron_vespo.policy import tiles
from megatron_vespo.policy.logprobs import token_log_probs
from tests.gpu.place import Place
from tests.host_syncs import count_host_syncs
from tests.unit.policy.test_logprobs import CASES, Case, check, make_inputs, run


def tile_size(elements: int, least_width: int) -> Any:
    """Within it, tiles of that size."""
    return mock.patch.dict(tiles.SIZES, {platform.device().type: tiles.TileSize(elements, least_width)})


def on_device(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.to(platform.device()) for tensor in tensors)


def run_cases() -> None:
    for case in CASES:
        hidden, weight, targets = on_device(make_inputs(case))
        with tile_size(*case.sizes):
            found = run(case, hidden, weight, targets)
        check({name: value.cpu() for name, value in found.items()}, case)


def test_it_equals_torch_in_float64(place: Place) -> None:
    place.run(run_cases)


def large(rows: int, hidden_size: int, entries: int) -> dict[str, float]:
    """Relative errors against float64 with bfloat16's own inputs, over several tiles and several blocks of each."""
    device = platform.device()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator).bfloat16()
    weight = (torch.randn(entries, hidden_size, generator=generator) * 2 / hidden_size**0.5).bfloat16()
    targets = torch.randint(entries, (rows,), generator=generator)
    wish = torch.randn(rows, generator=generator)
    results = []
    for exact in (False, True):
        h, w = ((x.double() if exact else x.to(device, copy=True)).requires_grad_() for x in (hidden, weight))
        if exact:
            log_p = (h @ w.T).log_softmax(1)
            log_pi, entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
        else:
            out = token_log_probs(
                h, w, targets.to(device), trained=rows, vocab_size=entries, temperature=1.0, entropy_gradient=True
            )
            log_pi, entropy = out.log_pi, out.entropy
        (log_pi * wish.to(log_pi) + 0.1 * entropy).sum().backward()
        results.append({"log_pi": log_pi.detach(), "entropy": entropy.detach(), "hidden": h.grad, "weight": w.grad})
    found, wanted = results
    return {name: float((found[name].cpu().double() - wanted[name]).norm() / wanted[name].norm()) for name in wanted}


def large_in_tiles(width: int) -> dict[str, float]:
    with tile_size(1, width):
        return large(96, 128, 12_345)


@pytest.mark.parametrize("width", [5000, 4096, 20_000])
def test_many_blocks_of_a_tile_are_right(place: Place, width: int) -> None:
    errors = place.run(large_in_tiles, width)
    assert errors["log_pi"] < 2e-3 and errors["entropy"] < 1e-3, errors
    assert errors["hidden"] < 1e-2 and errors["weight"] < 1e-2, errors


def memory_and_syncs(rows: int, hidden_size: int, entries: int, width: int) -> tuple[list[int], list[str]]:
    """Peak bytes of the forward and of the backward pass beyond what is there, and what the host waited for."""
    device = platform.device()
    hidden = torch.randn(rows, hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(entries, hidden_size, device=device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(entries, (rows,), device=device)
    peaks: list[int] = []

    def passes() -> None:
        before = _start()
        out = token_log_probs(hidden, weight, targets, trained=rows, vocab_size=entries, temperature=0.7)
        peaks.append(_peak() - before)
        before = _start()
        out.log_pi.sum().backward()
        peaks.append(_peak() - before - weight.nbytes)
        hidden.grad = weight.grad = None

    with tile_size(1, width):
        passes()  # compiles, and cuBLAS takes its workspace
        with count_host_syncs(device.type) as syncs:
            passes()
    return peaks[2:], syncs.events


def _start() -> int:
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def test_one_tile_of_logits_is_alive_and_nothing_waits(place: Place) -> None:
    rows, hidden_size, entries, width = (64, 32, 1024, 128) if place.rehearsal else (8192, 256, 65_536, 8192)
    (forward, backward), syncs = place.run(memory_and_syncs, rows, hidden_size, entries, width)
    assert syncs == []
    if not place.rehearsal:
        tile = 2 * rows * width
        room = tile // 2  # for cuBLAS; less than a second tile
        assert forward < tile + room
        # And the sum that is the hidden gradient in float32, and the gradient itself.
        assert backward < tile + 6 * rows * hidden_size + room


def refused_waits(case: Case) -> None:
    """As CUDA itself sees it."""
    if not torch.cuda.is_available():
        return
    hidden, weight, targets = on_device(make_inputs(case))
    run(case, hidden, weight, targets)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    out = token_log_probs(hidden, weight, targets, trained=5, vocab_size=case.vocab_size, temperature=0.7)
    out.log_pi.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cuda_sees_no_waiting_either(place: Place, dtype: torch.dtype) -> None:
    place.run(refused_waits, Case(dtype=dtype, trained=5))
