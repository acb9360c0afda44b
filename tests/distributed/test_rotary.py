"""Rotating all packed sequences at once is what Megatron does one after the other."""

from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.models import native
from megatron_vespo.policy.objectives import NextToken, denominators
from tests.policies import make_plan, make_policy, random_samples
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe


def _train(folder: Path, parallel_sizes: dict[str, int]) -> list[np.ndarray]:
    policy = make_policy(folder, parallel_sizes)
    samples = random_samples(9, 64)
    plan = make_plan(samples, 256)
    log_probs = policy.log_probs(samples, plan)
    policy.forward_backward(samples, plan, NextToken(denominators(samples)))
    gradients = [parameter.main_grad.numpy() for parameter in policy.chunks[0].parameters()]
    return [np.concatenate(log_probs), *gradients]


@pytest.mark.parametrize("size, sections", [(1, {}), (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True})])
def test_packed_rotation_is_megatrons_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, sections: dict[str, int]
) -> None:
    folder = make_tiny_qwen3_moe(tmp_path / "model")
    ours = run_ranks(size, _train, folder, sections, **sections)
    monkeypatch.setattr(native, "PackedSelfAttention", native.SelfAttention)
    theirs = run_ranks(size, _train, folder, sections, **sections)
    for own, upstream in zip(ours, theirs, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(own, upstream, strict=True))
