"""An update whose gradient, or its norm, is not finite on whatever rank changes nothing on any rank."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vespo import parallel
from megatron_vespo.policy.policy import Policy, StepResult
from megatron_vespo.types import Sample
from tests.checkpoints import SCHEDULE, State, differences, forward_backward, state_of, update
from tests.policies import make_policy, random_samples
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

VOCABULARY = 50
LARGE = 1e30  # finite, but its square is not
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "DP2": (2, {}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_moe(tmp_path_factory.mktemp("model") / "moe", vocab_size=VOCABULARY)


def spoil(policy: Policy, value: float, which: str) -> None:
    """Put a number into the gradients of the last rank, after they have been summed over the ranks."""
    if parallel.rank() == parallel.world_size() - 1:
        for name, parameter in policy.chunks[0].named_parameters():
            if which in name:
                parameter.main_grad.view(-1)[:] = value  # type: ignore[attr-defined]


# Of the norms of layers, tensor-parallel ranks have copies, which do not count in the gradient's norm.
BAD = [(value, which) for value in (float("nan"), float("inf")) for which in (".experts.", "layernorm")]
BAD += [(LARGE, ".experts.")]


def with_bad_steps(
    model: Path, samples: list[Sample], megatron: dict[str, Any]
) -> list[tuple[StepResult, list[str], list[str]]]:
    """Each bad step, what it changed, and what differs after a good one from a run without any bad."""
    policy, other = (make_policy(model, megatron, **SCHEDULE) for _ in range(2))
    for each in (policy, other):
        assert not update(each, samples, megatron)[1].skipped
    seen = []
    for value, which in BAD:
        before = state_of(policy)
        forward_backward(policy, samples, megatron)
        spoil(policy, value, which)
        result = policy.optim_step()
        changed = differences(state_of(policy), before)
        last: list[State] = []
        for each in (policy, other):
            assert not update(each, samples, megatron)[1].skipped
            last.append(state_of(each))
        assert differences(last[0], before), "or this shows nothing"
        seen.append((result, changed, differences(*last)))
    return seen


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_gradient_on_one_rank_changes_nothing(model: Path, layout: str, distributed: bool) -> None:
    size, megatron = LAYOUTS[layout]
    options = megatron | {"use_distributed_optimizer": distributed}
    for seen in run_ranks(size, with_bad_steps, model, random_samples(8, VOCABULARY), options, **megatron):
        for bad, (result, changed, differ) in zip(BAD, seen, strict=True):
            assert result.skipped, bad
            assert not changed, bad
            assert not differ, bad


def test_an_overflow_of_half_precision_is_skipped_too(model: Path) -> None:
    """Loss scaling finds it before there is a norm."""
    options = {"fp16": True, "initial_loss_scale": 2.0**40}
    ((result, skipped),) = run_ranks(1, overflow, model, random_samples(8, VOCABULARY), options)
    assert result.skipped and result.grad_norm != result.grad_norm
    assert skipped == [True, False]


def overflow(model: Path, samples: list[Sample], megatron: dict[str, Any]) -> tuple[StepResult, list[bool]]:
    policy = make_policy(model, megatron)
    results = [update(policy, samples, megatron)[1] for _ in range(60)]
    verdicts = [result.skipped for result in results]
    return results[0], sorted(set(verdicts), reverse=True)
