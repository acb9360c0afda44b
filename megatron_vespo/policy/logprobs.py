"""Log-probabilities and entropy of response tokens from hidden states and the output weight, by tiles of logits.

Logits of a long response and a vocabulary of 150,000 are gigabytes, and log_softmax wants them several times over. Here
the vocabulary is walked in tiles, all rows at once: the forward pass keeps for each row the largest logit, the sum of
exponentials and the sum of their products with the logits, as in an online softmax (arXiv 1805.02867), and saves the
log-sum-exp alone; the backward pass makes each tile of logits again. That is four matrix products, where a plain
softmax has three. Ranks that share the vocabulary exchange four numbers a row.

Matrix products are in the dtype of the hidden states, everything else in float32, or float64 for hidden states in
float64. With hidden states [R, H] in bfloat16, the memory beyond the results is, of a tile's elements, 10 bytes each in
the forward pass and 6 in the backward pass, and there 6 R H bytes for the sum over tiles that is the hidden gradient.

Nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vespo import parallel

TILE_ELEMENTS = 2**20
"""Logits of a tile where rows are few: 6 MB in the backward pass, and matrix products are at full speed."""
MIN_TILE_WIDTH = 2048
"""Vocabulary entries of a tile where rows are many. A tile takes about the memory of the hidden gradient then, to which
each tile adds [R, H]: with half of this width a CPU takes 3 % more time, with twice of it 1 % less."""


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """What the policy says of R response tokens. float64 where the hidden states are, else float32.

    Attributes:
        log_pi: Log-probability (nats) of each token, [R]; differentiable in its first rows, detached in the rest.
        entropy: Entropy (nats) of the distribution it was drawn from, [R]; differentiable as log_pi is if that was
            asked for, else detached.
        correct: Whether no token was more likely, [R] bool.
    """

    log_pi: Tensor
    entropy: Tensor
    correct: Tensor


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    trained: int,
    vocab_size: int,
    temperature: float,
    entropy_gradient: bool = False,
) -> TokenLogProbs:
    """Log-probabilities of ``targets`` under softmax(hidden @ weight.T / temperature).

    A collective over the tensor-parallel ranks, except for no rows; the backward pass is none. The gradient of
    ``hidden`` is this rank's share, which the caller sums over those ranks. Without rows, or trained ones, gradients
    are zero, but they are there. A row's log-probability is NaN if a logit of its is NaN or infinite, whatever the
    other rows are.

    Args:
        hidden: Final hidden states of the response positions, [R, H], equal on all tensor-parallel ranks.
        weight: This rank's slice of the output layer, [V / tensor-parallel size, H].
        targets: [R] int64.
        trained: The first so many rows have a gradient. The others cost a forward pass only.
        vocab_size: Size without padding; padded entries have probability 0.
        temperature: The sampler's, so that pi is the distribution that mu is of.
        entropy_gradient: Make the entropy differentiable too, for a second tile of memory in the backward pass.
    """
    trained_log_pi, rest, trained_entropy, rest_entropy, correct = _TiledLogProbs.apply(
        hidden, weight, targets, trained, vocab_size, temperature, entropy_gradient
    )
    return TokenLogProbs(torch.cat([trained_log_pi, rest]), torch.cat([trained_entropy, rest_entropy]), correct)


class _TiledLogProbs(torch.autograd.Function):
    """With logits x = hidden @ weight.T, d log pi_t / d x_v = (1[v = t] - p_v) / temperature, and the entropy H has
    d H / d x_v = -p_v (log p_v + H) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        trained: int,
        vocab_size: int,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[Tensor, ...]:
        first = parallel.tensor_parallel_rank() * len(weight)
        entries = max(min(vocab_size - first, len(weight)), 0)
        local_targets = targets - first
        sums = _row_sums(hidden, weight[:entries], local_targets, temperature)
        highest, total, weighted, chosen = _over_ranks(sums)
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, local_targets, highest + log_total, entropy if entropy_gradient else None)
        ctx.trained, ctx.entries, ctx.temperature = trained, entries, temperature
        # The last term is 0, but NaN beside a logit of -inf, of which the others do not tell.
        log_pi = (chosen - highest) - log_total + 0 * weighted
        correct = chosen >= highest
        trained_entropy, rest_entropy, rest = (
            entropy[:trained].clone(),
            entropy[trained:].clone(),
            log_pi[trained:].clone(),
        )
        ctx.mark_non_differentiable(rest, rest_entropy, correct, *(() if entropy_gradient else (trained_entropy,)))
        return log_pi[:trained].clone(), rest, trained_entropy, rest_entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, unused: Any, entropy_grad: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
        all_hidden, weight, all_targets, all_log_sum_exp, entropy = ctx.saved_tensors
        hidden, local_targets, log_sum_exp = (x[: ctx.trained] for x in (all_hidden, all_targets, all_log_sum_exp))
        # The rest of the rows, and of the weight, is padding or has no gradient.
        hidden_grad = torch.zeros_like(all_hidden, dtype=log_sum_exp.dtype)
        weight_grad = torch.empty_like(weight)
        weight_grad[ctx.entries if ctx.trained else 0 :] = 0
        scale = (grad / -ctx.temperature).unsqueeze(1)
        tiles = _Tiles(hidden, ctx.entries, ctx.temperature)
        for start, stop in tiles.bounds:
            part = weight[start:stop]
            log_probabilities = tiles.logits(part).sub_(log_sum_exp.unsqueeze(1))
            of_entropy = None if entropy is None else log_probabilities + entropy[: ctx.trained].unsqueeze(1)
            probabilities = log_probabilities.exp_()
            if of_entropy is not None:
                of_entropy.mul_(probabilities).mul_((entropy_grad / -ctx.temperature).unsqueeze(1))
            column, inside = _columns(local_targets, start, stop)
            probabilities.scatter_add_(1, column, -inside.to(probabilities.dtype))
            logits_grad = probabilities.mul_(scale)
            logits_grad = tiles.rounded(logits_grad if of_entropy is None else logits_grad.add_(of_entropy))
            torch.mm(logits_grad.t(), hidden, out=weight_grad[start:stop])
            tiles.add_product(hidden_grad[: ctx.trained], logits_grad, part)
        return hidden_grad.to(hidden.dtype), weight_grad, None, None, None, None, None


class _Tiles:
    """The tiles that a vocabulary is walked in, and the memory that they have in turn.

    Attributes:
        exact: Dtype of what is not a matrix product.
        width: Vocabulary entries of a tile, but perhaps the last.
        bounds: First entry of each tile and the one after its last.
    """

    def __init__(self, hidden: Tensor, entries: int, temperature: float) -> None:
        self.hidden = hidden
        self.temperature = temperature
        self.exact = torch.promote_types(hidden.dtype, torch.float32)
        rows, size = hidden.shape
        self.width = min(max(TILE_ELEMENTS // max(rows, 1), MIN_TILE_WIDTH), entries)
        starts = range(0, entries, self.width) if rows and entries else ()
        self.bounds = [(start, min(start + self.width, entries)) for start in starts]
        # Room for [R, H] too, for add_product.
        self._memory = hidden.new_empty(rows * max(self.width, size), dtype=self.exact)
        self._products = self._memory if hidden.dtype == self.exact else hidden.new_empty(rows * self.width)

    def logits(self, part: Tensor) -> Tensor:
        """Logits [R, W] over a part [W, H] of the vocabulary; valid until the next call of any method."""
        products = _shaped(self._products, len(self.hidden), len(part))
        torch.mm(self.hidden, part.t(), out=products)
        logits = products
        if products.dtype != self.exact:
            logits = _shaped(self._memory, *products.shape).copy_(products)
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def rounded(self, tile: Tensor) -> Tensor:
        """What is where the logits were, in the dtype of the hidden states."""
        return tile if tile.dtype == self.hidden.dtype else _shaped(self._products, *tile.shape).copy_(tile)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left @ right to ``total`` [R, H], which is in the exact dtype."""
        if total.dtype == left.dtype:
            total.addmm_(left, right)
        else:
            # On a CPU, a sum of two dtypes would make this copy in new memory.
            total.add_(_shaped(self._memory, *total.shape).copy_(left @ right))


def _shaped(memory: Tensor, rows: int, columns: int) -> Tensor:
    return memory[: rows * columns].view(rows, columns)


def _columns(local_targets: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Column of each row's target in a tile, and whether it has one there; both [R, 1]."""
    column = (local_targets - start).unsqueeze(1)
    return column.clamp(0, stop - start - 1), (column >= 0) & (column < stop - start)


def _row_sums(hidden: Tensor, vocabulary: Tensor, local_targets: Tensor, temperature: float) -> Tensor:
    """Of each row's logits x here: m = max x, sum exp(x - m), sum exp(x - m) * (x - m), x of the target; [4, R]."""
    tiles = _Tiles(hidden, len(vocabulary), temperature)
    sums = torch.zeros(4, len(hidden), dtype=tiles.exact, device=hidden.device)
    highest, total, weighted, chosen = sums
    # Not -inf, of which differences would be NaN.
    highest.fill_(torch.finfo(tiles.exact).min / 2)
    chosen.fill_(-torch.inf)
    memory = sums.new_empty(len(hidden) * tiles.width)
    for start, stop in tiles.bounds:
        logits = tiles.logits(vocabulary[start:stop])
        column, inside = _columns(local_targets, start, stop)
        chosen.copy_(torch.where(inside, logits.gather(1, column), chosen.unsqueeze(1)).squeeze(1))
        new = torch.maximum(highest, logits.amax(1))
        fall = highest - new
        factor = fall.exp()
        exponentials = torch.exp(logits.sub_(new.unsqueeze(1)), out=_shaped(memory, *logits.shape))
        weighted.add_(fall * total).mul_(factor)
        total.mul_(factor).add_(exponentials.sum(1))
        weighted.add_(exponentials.mul_(logits).sum(1))
        highest.copy_(new)
    return sums


def _over_ranks(sums: Tensor) -> Tensor:
    """``_row_sums`` of the whole vocabulary from those of each rank's slice, equal on every rank. A collective."""
    size = parallel.tensor_parallel_size()
    if size == 1 or not sums.numel():
        return sums
    parts = sums.new_empty(size * len(sums), sums.shape[1])
    dist.all_gather_into_tensor(parts, sums, group=parallel.tensor_parallel_group())
    highest, total, weighted, chosen = parts.view(size, *sums.shape).unbind(1)
    new = highest.amax(0)
    fall = highest - new
    factor = fall.exp()
    return torch.stack([new, (total * factor).sum(0), ((weighted + fall * total) * factor).sum(0), chosen.amax(0)])
