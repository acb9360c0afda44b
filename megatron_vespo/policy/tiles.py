"""Tiles of logits that a vocabulary is walked in: their sizes, their memory, and the arithmetic on one of them.

Here in plain torch; :mod:`tile_kernels` has the same arithmetic in one pass over a tile, for GPUs. Both are as exact:
matrix products in the dtype of the hidden states, everything else in float32, or float64 for hidden states in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileSize:
    """How large a tile is.

    Attributes:
        elements: Logits of a tile where rows are few.
        least_width: Vocabulary entries of a tile where rows are many.
    """

    elements: int
    least_width: int


SIZES = {
    # 6 MB in the backward pass, and matrix products are at full speed. Where rows are many, a tile takes about the
    # memory of the hidden gradient, to which each tile adds [R, H]: with half of this width a CPU takes 3 % more time,
    # with twice of it 1 % less.
    "cpu": TileSize(elements=2**20, least_width=2048),
    # 256 MB in bfloat16: 8,192 entries for 16,384 rows. No tile at which products are efficient stays in 50 MB of L2,
    # so that wide ones are better: the hidden gradient, 8 bytes of [R, H] read and written in float32 for each tile, is
    # then 2 bytes a logit at hidden size 2048 where the logits themselves are 6, and products fill all multiprocessors
    # many times over.
    "cuda": TileSize(elements=2**27, least_width=4096),
}
"""By type of device."""

LOWEST = -1e38
"""Where the largest logit begins: not -inf, of which differences would be NaN."""


def width(device: torch.device, rows: int, entries: int) -> int:
    """Entries of a tile, for so many rows and entries of the vocabulary."""
    size = SIZES[device.type]
    return min(max(size.elements // max(rows, 1), size.least_width), entries)


class Tiles:
    """The tiles and the memory that they have in turn.

    Attributes:
        exact: Dtype of what is not a matrix product.
        width: Vocabulary entries of a tile, but perhaps the last.
        bounds: First entry of each tile and the one after its last.
    """

    def __init__(self, hidden: Tensor, entries: int, temperature: float) -> None:
        """Cut the vocabulary.

        Args:
            hidden: [R, H].
            entries: Size of this rank's vocabulary without padding.
            temperature: Logits are divided by it.
        """
        self.hidden = hidden
        self.temperature = temperature
        self.exact = torch.promote_types(hidden.dtype, torch.float32)
        rows = len(hidden)
        self.width = width(hidden.device, rows, entries)
        starts = range(0, entries, self.width) if rows and entries else ()
        self.bounds = [(start, min(start + self.width, entries)) for start in starts]
        self._allocate()

    def _allocate(self) -> None:
        rows, size = self.hidden.shape
        # Room for [R, H] too, for add_product.
        self._memory = self.hidden.new_empty(rows * max(self.width, size), dtype=self.exact)
        plain = self.hidden.dtype == self.exact
        self._products = self._memory if plain else self.hidden.new_empty(rows * self.width)
        self._exponentials: Tensor | None = None

    def add_to_sums(self, sums: Tensor, part: Tensor, column: Tensor) -> None:
        """Take a tile into what is known of each row.

        Args:
            sums: Of the logits x so far: m = max x, sum exp(x - m), sum exp(x - m) * (x - m), x of the target; [4, R]
                in the exact dtype. Changed.
            part: The tile's part of the vocabulary, [W, H].
            column: Column of each row's target in this tile, [R]; outside of 0 to W - 1: in another.
        """
        highest, total, weighted, chosen = sums
        logits = self._logits(part)
        if self._exponentials is None:
            self._exponentials = sums.new_empty(len(self.hidden) * self.width)
        place, inside = _places(column, len(part))
        chosen.copy_(torch.where(inside, logits.gather(1, place), chosen.unsqueeze(1)).squeeze(1))
        new = torch.maximum(highest, logits.amax(1))
        fall = highest - new
        factor = fall.exp()
        exponentials = torch.exp(logits.sub_(new.unsqueeze(1)), out=_shaped(self._exponentials, *logits.shape))
        weighted.add_(fall * total).mul_(factor)
        total.mul_(factor).add_(exponentials.sum(1))
        weighted.add_(exponentials.mul_(logits).sum(1))
        highest.copy_(new)

    def gradient(
        self,
        part: Tensor,
        column: Tensor,
        log_sum_exp: Tensor,
        scale: Tensor,
        entropy: Tensor | None,
        entropy_scale: Tensor | None,
    ) -> Tensor:
        """Gradient of a tile's matrix products, in the dtype of the hidden states; valid until the next tile.

        Args:
            part: The tile's part of the vocabulary, [W, H].
            column: Column of each row's target in this tile, [R].
            log_sum_exp: Of each row's logits, [R].
            scale: Gradient of each row's log-probability divided by minus the temperature, [R].
            entropy: Entropy of each row, [R], where it has a gradient.
            entropy_scale: The same of the entropy, [R].

        Returns:
            (p - 1[target]) * scale + p * (log p + entropy) * entropy_scale, [R, W].
        """
        log_probabilities = self._logits(part).sub_(log_sum_exp.unsqueeze(1))
        of_entropy = None if entropy is None else log_probabilities + entropy.unsqueeze(1)
        probabilities = log_probabilities.exp_()
        if of_entropy is not None and entropy_scale is not None:
            of_entropy.mul_(probabilities).mul_(entropy_scale.unsqueeze(1))
        place, inside = _places(column, len(part))
        probabilities.scatter_add_(1, place, -inside.to(probabilities.dtype))
        gradient = probabilities.mul_(scale.unsqueeze(1))
        gradient = gradient if of_entropy is None else gradient.add_(of_entropy)
        if gradient.dtype == self.hidden.dtype:
            return gradient
        return _shaped(self._products, *gradient.shape).copy_(gradient)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left @ right to ``total`` [R, H], which is in the exact dtype."""
        if total.dtype == left.dtype:
            total.addmm_(left, right)
        else:
            # On a CPU, a sum of two dtypes would make this copy in new memory.
            total.add_(_shaped(self._memory, *total.shape).copy_(left @ right))

    def _multiplied(self, part: Tensor) -> Tensor:
        """Product of the hidden states and a part of the vocabulary, [R, W]."""
        return torch.mm(self.hidden, part.t(), out=_shaped(self._products, len(self.hidden), len(part)))

    def _logits(self, part: Tensor) -> Tensor:
        """Logits [R, W] in the exact dtype; valid until the next call of any method."""
        products = self._multiplied(part)
        logits = products
        if products.dtype != self.exact:
            logits = _shaped(self._memory, *products.shape).copy_(products)
        return logits if self.temperature == 1 else logits.div_(self.temperature)


def _shaped(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)


def _places(column: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Column of each row's target in a tile, as an index, and whether it has one there; both [R, 1]."""
    column = column.unsqueeze(1)
    return column.clamp(0, width - 1), (column >= 0) & (column < width)
