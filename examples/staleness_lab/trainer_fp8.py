"""FP8 in the trainer, emulated by hooks on Megatron's linear modules.

During a module's forward pass its input is rounded and ``module.weight`` is a rounded copy; the gradient reaches the
real weight as if nothing had been rounded. The copy lies in the instance's ``__dict__``, which Python reads before it
asks ``nn.Module`` for parameters, and is gone afterwards: names, parameters, gradient buffers, checkpoints and exports
never see it. The backward pass multiplies with what the forward pass did: rounded weights and inputs, full gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from examples.staleness_lab.fake_fp8 import Fp8, straight_through
from megatron_vespo import platform

platform.prepare()

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402 - after prepare()

Linears = Literal["experts", "all"]


def emulate_fp8(chunks: Sequence[torch.nn.Module], fp8: Fp8, linears: Linears) -> list[str]:
    """Round inputs and weights of these linears from now on.

    Args:
        chunks: The model; wrapped for training or not.
        fp8: How.
        linears: Those of the experts, or all but router, embedding and output layer, which stay exact as in practice.

    Returns:
        Names of the modules.
    """
    hooked = []
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if not isinstance(module, ColumnParallelLinear | RowParallelLinear) or name.endswith("output_layer"):
                continue
            if linears == "all" or ".mlp.experts." in name:
                module.register_forward_pre_hook(_Before(fp8))
                module.register_forward_hook(_after, always_call=True)
                hooked.append(name)
    return hooked


class _Before:
    def __init__(self, fp8: Fp8) -> None:
        self._fp8 = fp8

    def __call__(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        weight = module.get_parameter("weight")
        module.__dict__["weight"] = straight_through(weight, self._fp8.weight(weight.detach()))
        return straight_through(inputs[0], self._fp8.activation(inputs[0].detach())), *inputs[1:]


def _after(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    module.__dict__.pop("weight", None)
