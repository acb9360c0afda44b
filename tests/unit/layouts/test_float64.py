from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vespo.layouts.float64 import Float64
from megatron_vespo.layouts.reference import load_model
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe

TOKENS = torch.arange(3, 43)[None]


class Narrow(TorchDispatchMode):
    """Collects the operations that make a float32 tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                self.operations.add(str(func))
        return result


def run(folder: Path, mode: Any) -> tuple[Tensor, set[str]]:
    """Log-probabilities, and the float32 operations of the forward and backward pass."""
    with mode:
        model = load_model(str(folder))
        with Narrow() as narrow:
            log_probs = model(TOKENS, use_cache=False).logits.log_softmax(-1)
            log_probs[0, :, 5].sum().backward()
    assert log_probs.dtype == torch.float64
    return log_probs.detach(), narrow.operations


@pytest.mark.parametrize("make", [make_tiny_qwen3, make_tiny_qwen3_moe])
def test_nothing_is_float32_and_that_matters(make: Any, tmp_path: Path) -> None:
    wide, none = run(make(tmp_path), Float64())
    islands, some = run(tmp_path, nullcontext())
    assert not none
    assert {"aten._to_copy.default"} <= some, "a model of float64 computes some things in float32 by itself"
    difference = float((wide - islands).abs().max())
    assert 1e-9 < difference < 1e-4


def test_the_mode_is_gone_afterwards() -> None:
    with Float64():
        assert torch.ones(1).dtype == torch.ones(1, dtype=torch.float32).dtype == torch.float64
        assert torch.ones(1, dtype=torch.int32).float().dtype == torch.float64
        assert torch.ones(1, dtype=torch.float64).to(torch.float32).dtype == torch.float64
        assert torch.ones(1, dtype=torch.int64).dtype == torch.int64
    assert torch.ones(1).dtype == torch.float32
    assert torch.ones(1, dtype=torch.int32).float().dtype == torch.float32
