"""FP8 (e4m3) as GPUs and engines quantise to it, emulated: values are rounded to what FP8 could hold, kept as floats.

    tensor   one scale for the whole tensor
    block    weights: one scale for each 128 x 128 tile; activations: one for each token and 128 features (DeepSeek-V3)

A scale is the largest magnitude divided by 448, e4m3's largest number, in float32, or rounded up to a power of two
(``ue8m0``, as Blackwell's block formats and DeepSeek-V3.1 store them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
BLOCK = 128
# An all-zero block has no scale of its own; this one keeps its zeros.
_SMALLEST = 2.0**-126


@dataclass(frozen=True, slots=True)
class Fp8:
    """How tensors are quantised.

    Attributes:
        granularity: What shares a scale: ``tensor`` or ``block``.
        scale: ``fp32``, or ``ue8m0`` for powers of two.
    """

    granularity: Literal["tensor", "block"] = "block"
    scale: Literal["fp32", "ue8m0"] = "fp32"

    def weight(self, weight: Tensor) -> Tensor:
        """A weight [..., rows, columns] rounded; leading dimensions are experts, each quantised by itself."""
        if self.granularity == "tensor":
            return self._round(weight, weight.abs().amax((-2, -1), keepdim=True))
        rows, columns = weight.shape[-2:]
        padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
        tiles = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., tiles, 128, tiles, 128]
        rounded = self._round(tiles, tiles.abs().amax((-3, -1), keepdim=True))
        return rounded.flatten(-2).flatten(-3, -2)[..., :rows, :columns]

    def activation(self, x: Tensor) -> Tensor:
        """Activations [..., features] rounded."""
        if x.numel() == 0:
            return x
        if self.granularity == "tensor":
            return self._round(x, x.abs().amax())
        features = x.shape[-1]
        groups = F.pad(x, (0, -features % BLOCK)).unflatten(-1, (-1, BLOCK))
        return self._round(groups, groups.abs().amax(-1, keepdim=True)).flatten(-2)[..., :features]

    def _round(self, x: Tensor, largest: Tensor) -> Tensor:
        scale = (largest.float() / E4M3_MAX).clamp(min=_SMALLEST)
        if self.scale == "ue8m0":
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        # Clamped, since the division may round to just above the largest number, which the cast would make NaN.
        quantised = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return (quantised.float() * scale).to(x.dtype)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient going to ``x`` as if nothing had been rounded."""
    return _StraightThrough.apply(x, rounded)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
