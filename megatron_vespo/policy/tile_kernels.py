"""The arithmetic on a tile of logits in one pass over it, for GPUs (Triton).

On a GPU the matrix products are so fast that what is done to their results between them decides. In plain torch a tile
in bfloat16 is read and written eight times over in float32: 46 bytes a logit in the forward pass and 36 in the backward
pass beside the products, longer than all four products on an H100. Here it is read once, 2 bytes, in the forward pass
and overwritten once, 4 bytes, in the backward pass; no copy in float32 is made.

``TRITON_INTERPRET=1``, set before Triton is imported, runs these kernels on CPU tensors, as the tests do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vespo.policy.tiles import LOWEST, Tiles

_LOWEST = tl.constexpr(LOWEST)
# 256 threads, 16 bytes of bfloat16 each and twice that: one and two of a GPU's widest loads.
SUM_BLOCK, GRADIENT_BLOCK, WARPS = 2048, 4096, 8


@triton.jit(do_not_specialize=["rows"])
def sum_kernel(
    products: tl.tensor,
    columns: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    INVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row: ``Tiles.add_to_sums``. Each lane keeps sums of its own, as an online softmax, until the row's end."""
    row = tl.program_id(0)
    line = products + row.to(tl.int64) * width
    lanes = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], _LOWEST, EXACT)
    total = tl.zeros([BLOCK], EXACT)
    weighted = tl.zeros([BLOCK], EXACT)
    for start in range(0, width, BLOCK):
        inside = start + lanes < width
        x = tl.load(line + start + lanes, mask=inside, other=0.0).to(EXACT) * INVERSE
        x = tl.where(inside, x, _LOWEST)
        # Of x and the largest so far one is the new largest: one exponential serves for either case.
        fall = -tl.abs(x - highest)
        factor = tl.where(inside, tl.exp(fall), 0.0)
        rises = x > highest
        weighted = tl.where(rises, (weighted + fall * total) * factor, weighted + factor * fall)
        total = tl.where(rises, total * factor + 1.0, total + factor)
        highest = tl.maximum(highest, x)
    # The row's own sums of earlier tiles and those of the lanes become one.
    old_highest = tl.load(sums + row)
    old_total = tl.load(sums + rows + row)
    old_weighted = tl.load(sums + 2 * rows + row)
    new = tl.maximum(old_highest, tl.max(highest, 0))
    fall = highest - new
    factor = tl.exp(fall)
    old_fall = old_highest - new
    old_factor = tl.exp(old_fall)
    new_total = old_total * old_factor + tl.sum(total * factor, 0)
    new_weighted = (old_weighted + old_fall * old_total) * old_factor + tl.sum((weighted + fall * total) * factor, 0)
    tl.store(sums + row, new)
    tl.store(sums + rows + row, new_total)
    tl.store(sums + 2 * rows + row, new_weighted)
    column = tl.load(columns + row)
    if (column >= 0) & (column < width):
        tl.store(sums + 3 * rows + row, tl.load(line + column).to(EXACT) * INVERSE)


@triton.jit
def gradient_kernel(
    products: tl.tensor,
    columns: tl.tensor,
    log_sum_exp: tl.tensor,
    scale: tl.tensor,
    entropy: tl.tensor,
    entropy_scale: tl.tensor,
    width: tl.tensor,
    INVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    OF_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A part of one row: products of ``Tiles.gradient`` become their gradient, in their own memory."""
    row = tl.program_id(0)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = products + row.to(tl.int64) * width + lanes
    inside = lanes < width
    x = tl.load(places, mask=inside, other=0.0).to(EXACT) * INVERSE
    log_probability = x - tl.load(log_sum_exp + row)
    probability = tl.exp(log_probability)
    gradient = (probability - tl.where(lanes == tl.load(columns + row), 1.0, 0.0)) * tl.load(scale + row)
    if OF_ENTROPY:
        of_entropy = (log_probability + tl.load(entropy + row)) * probability * tl.load(entropy_scale + row)
        gradient += of_entropy
    tl.store(places, gradient.to(products.dtype.element_ty), mask=inside)


class FusedTiles(Tiles):
    """Tiles whose arithmetic is one kernel in each pass, in the memory of the products."""

    def _allocate(self) -> None:
        self._products = self.hidden.new_empty(len(self.hidden) * self.width)
        self._exact = tl.float64 if self.exact == torch.float64 else tl.float32

    def add_to_sums(self, sums: Tensor, part: Tensor, column: Tensor) -> None:
        """As that of ``Tiles``."""
        products = self._multiplied(part)
        rows, width = products.shape
        sum_kernel[(rows,)](
            products,
            column,
            sums,
            rows,
            width,
            INVERSE=1 / self.temperature,
            EXACT=self._exact,
            BLOCK=SUM_BLOCK,
            num_warps=WARPS,
        )

    def gradient(
        self,
        part: Tensor,
        column: Tensor,
        log_sum_exp: Tensor,
        scale: Tensor,
        entropy: Tensor | None,
        entropy_scale: Tensor | None,
    ) -> Tensor:
        """As that of ``Tiles``."""
        products = self._multiplied(part)
        rows, width = products.shape
        gradient_kernel[(rows, triton.cdiv(width, GRADIENT_BLOCK))](
            products,
            column,
            log_sum_exp,
            scale,
            scale if entropy is None else entropy,  # not read then
            scale if entropy_scale is None else entropy_scale,
            width,
            INVERSE=1 / self.temperature,
            EXACT=self._exact,
            OF_ENTROPY=entropy is not None,
            BLOCK=GRADIENT_BLOCK,
            num_warps=WARPS,
        )
        return products

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """As that of ``Tiles``; the sum is part of the product, in float32, and no tile of it is rounded."""
        if total.dtype == left.dtype:
            total.addmm_(left, right)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
