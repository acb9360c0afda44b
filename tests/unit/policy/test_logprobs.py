"""Log-probabilities from vocabulary-parallel logits equal torch's on the whole vocabulary."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vespo import parallel
from megatron_vespo.policy.logprobs import token_log_probs
from tests.ranks import run_ranks

VOCABULARY, PADDED, TOKENS = 10, 32, 9  # over 4 ranks the last two shards are all padding
CASES = [(1.0, torch.float32), (0.7, torch.float32), (2.5, torch.float32), (0.7, torch.bfloat16)]


def full_logits() -> Tensor:
    logits = torch.randn(TOKENS, PADDED, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, VOCABULARY:] += 50  # padding that would win if it were not masked
    logits[0, 3] = logits[0, 7] = 20.0  # a tie, for the argmax
    logits[1] = 0.0
    logits[2] *= 1e3
    return logits


def targets() -> Tensor:
    return torch.tensor([3, 0, 9, 4, 5, 6, 7, 8, 1])


def compute() -> list[dict[str, Any]]:
    """For each case what this rank gets, and the gradient of its shard."""
    width = PADDED // parallel.tensor_parallel_size()
    first = parallel.tensor_parallel_rank() * width
    results = []
    for temperature, dtype in CASES:
        shard = full_logits()[:, first : first + width].to(dtype).clone().requires_grad_()
        before = shard.detach().clone()
        out = token_log_probs(shard, targets(), vocab_size=VOCABULARY, temperature=temperature)
        (out.log_pi * torch.arange(1, TOKENS + 1)).sum().backward()
        assert torch.equal(shard.detach(), before), "the logits are changed"
        results.append(
            {"log_pi": out.log_pi.detach(), "entropy": out.entropy, "correct": out.correct, "gradient": shard.grad}
        )
    return results


def expected(temperature: float, dtype: torch.dtype) -> dict[str, Tensor]:
    logits = full_logits().to(dtype).clone().requires_grad_()
    log_p = (logits.float()[:, :VOCABULARY] / temperature).log_softmax(-1)
    log_pi = log_p.gather(1, targets()[:, None])[:, 0]
    (log_pi * torch.arange(1, TOKENS + 1)).sum().backward()
    return {
        "log_pi": log_pi.detach(),
        "entropy": -(log_p.exp() * log_p).sum(-1).detach(),
        "correct": torch.tensor([int((row == row.max()).nonzero()[0]) for row in log_p]) == targets(),
        "gradient": logits.grad,
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_log_probabilities_equal_torchs(size: int) -> None:
    ranks = run_ranks(size, compute, tensor_model_parallel_size=size)
    for number, (temperature, dtype) in enumerate(CASES):
        want = expected(temperature, dtype)
        for rank in ranks:
            for name in ("log_pi", "entropy", "correct"):
                torch.testing.assert_close(rank[number][name], want[name], atol=2e-6, rtol=2e-6)
        gradient = torch.cat([rank[number]["gradient"] for rank in ranks], dim=1)
        torch.testing.assert_close(
            gradient, want["gradient"], atol=2e-6, rtol=1e-2 if dtype == torch.bfloat16 else 2e-6
        )


def test_the_reference_has_something_to_say() -> None:
    want = expected(1.0, torch.float32)
    assert want["correct"].any() and not want["correct"].all()
    assert want["gradient"][:, VOCABULARY:].abs().sum() == 0
