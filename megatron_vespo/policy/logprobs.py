"""Log-probabilities and entropy of response tokens from hidden states and the output weight, by tiles of logits.

Logits of a long response and a vocabulary of 150,000 are gigabytes, and log_softmax wants them several times over. Here
the vocabulary is walked in tiles, all rows at once: the forward pass keeps for each row the largest logit, the sum of
exponentials and the sum of their products with the logits, as in an online softmax (arXiv 1805.02867), and saves the
log-sum-exp alone; the backward pass makes each tile of logits again. That is four matrix products, where a plain
softmax has three. Ranks that share the vocabulary exchange four numbers a row.

With hidden states [R, H] in bfloat16, the memory beyond the results is, of a tile's elements, 10 bytes each in the
forward pass and 6 in the backward pass on a CPU, 2 in either on a GPU, and 6 R H bytes in the backward pass for the sum
over tiles that is the hidden gradient. :mod:`tiles` says what a tile is and what is done with it.

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
from megatron_vespo.policy.tiles import LOWEST, Tiles


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


def tiles_of(hidden: Tensor, entries: int, temperature: float) -> Tiles:
    """The tiles for the device that the hidden states are on; arguments as those of ``Tiles``."""
    if hidden.is_cuda:
        from megatron_vespo.policy.tile_kernels import FusedTiles  # Triton comes with torch where torch has CUDA

        return FusedTiles(hidden, entries, temperature)
    return Tiles(hidden, entries, temperature)


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
        scale = grad / -ctx.temperature
        entropy_scale = None if entropy is None else entropy_grad / -ctx.temperature
        entropy = None if entropy is None else entropy[: ctx.trained]
        tiles = tiles_of(hidden, ctx.entries, ctx.temperature)
        for start, stop in tiles.bounds:
            part = weight[start:stop]
            logits_grad = tiles.gradient(part, local_targets - start, log_sum_exp, scale, entropy, entropy_scale)
            torch.mm(logits_grad.t(), hidden, out=weight_grad[start:stop])
            tiles.add_product(hidden_grad[: ctx.trained], logits_grad, part)
        return hidden_grad.to(hidden.dtype), weight_grad, None, None, None, None, None


def _row_sums(hidden: Tensor, vocabulary: Tensor, local_targets: Tensor, temperature: float) -> Tensor:
    """Of each row's logits x here: m = max x, sum exp(x - m), sum exp(x - m) * (x - m), x of the target; [4, R]."""
    tiles = tiles_of(hidden, len(vocabulary), temperature)
    sums = torch.zeros(4, len(hidden), dtype=tiles.exact, device=hidden.device)
    sums[0], sums[3] = LOWEST, -torch.inf
    for start, stop in tiles.bounds:
        tiles.add_to_sums(sums, vocabulary[start:stop], local_targets - start)
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
