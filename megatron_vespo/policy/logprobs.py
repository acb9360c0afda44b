"""Token log-probabilities and entropy from vocabulary-parallel logits, without gathering the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_vespo import parallel


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """What the policy says of each position.

    Attributes:
        log_pi: Log-probability (nats) of the target, [T] float32, differentiable.
        entropy: Entropy (nats) of the distribution, [T] float32, detached.
        correct: Whether the target is the most likely token, [T] bool.
    """

    log_pi: Tensor
    entropy: Tensor
    correct: Tensor


def token_log_probs(logits: Tensor, targets: Tensor, *, vocab_size: int, temperature: float) -> TokenLogProbs:
    """Log-probabilities of ``targets`` under softmax(logits / temperature), in float32.

    Args:
        logits: This rank's part of the vocabulary, [T, V / tensor-parallel size].
        targets: [T] int64.
        vocab_size: Size without padding; padded entries get probability 0.
        temperature: The sampler's, so that pi is the distribution that mu is of.
    """
    scaled = logits.float() / temperature  # a new tensor: Megatron's cross entropy works in place
    first = parallel.tensor_parallel_rank() * scaled.shape[-1]
    real = max(min(vocab_size - first, scaled.shape[-1]), 0)
    if real < scaled.shape[-1]:
        padding = torch.arange(scaled.shape[-1], device=scaled.device) >= real
        # Not -inf: a shard that is all padding would give inf - inf in the entropy.
        scaled = scaled.masked_fill(padding, torch.finfo(torch.float32).min / 2)
    with torch.no_grad():
        entropy, most_likely = _entropy_and_argmax(scaled, first)
    log_pi = -vocab_parallel_cross_entropy(scaled.unsqueeze(1), targets.unsqueeze(1)).squeeze(1)
    return TokenLogProbs(log_pi, entropy, most_likely == targets)


def _entropy_and_argmax(scaled: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Entropy and most likely token of each row, reduced over the tensor-parallel group."""
    group = parallel.tensor_parallel_group()
    local_max, local_argmax = scaled.max(dim=-1)
    highest = local_max.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    shifted = scaled - highest.unsqueeze(-1)
    weight = shifted.exp()
    sums = torch.stack([weight.sum(-1), (weight * shifted).sum(-1)])
    dist.all_reduce(sums, group=group)
    entropy = sums[0].log() - sums[1] / sums[0]
    # The lowest token id that reaches the maximum, on whichever rank it is.
    none = torch.iinfo(torch.int64).max
    most_likely = torch.where(local_max == highest, local_argmax + first, none)
    dist.all_reduce(most_likely, op=dist.ReduceOp.MIN, group=group)
    return entropy, most_likely
