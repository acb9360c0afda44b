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


def with_a_bad_step(
    model: Path, samples: list[Sample], megatron: dict[str, Any], value: float, which: str
) -> tuple[StepResult, list[str], list[str]]:
    """The bad step, what it changed, and what differs after a good one from a run without the bad."""
    policy, other = (make_policy(model, megatron, **SCHEDULE) for _ in range(2))
    for each in (policy, other):
        assert not update(each, samples, megatron)[1].skipped
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
    return result, changed, differences(*last)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), LARGE])
@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_gradient_on_one_rank_changes_nothing(model: Path, layout: str, distributed: bool, value: float) -> None:
    size, megatron = LAYOUTS[layout]
    options = megatron | {"use_distributed_optimizer": distributed}
    samples = random_samples(8, VOCABULARY)
    # Of the norms of layers, tensor-parallel ranks have copies, which do not count in the gradient's norm.
    for which in (".experts.", "layernorm") if value != LARGE else (".experts.",):
        for result, changed, differ in run_ranks(
            size, with_a_bad_step, model, samples, options, value, which, **megatron
        ):
            assert result.skipped
            assert not changed
            assert not differ


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
