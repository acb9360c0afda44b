import math

import numpy as np
import pytest

from megatron_vespo.metrics.measure import rollout_metrics
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.types import Prompt, Sample, SampleGroup


def group(*rewards: float | None) -> SampleGroup:
    """None: could not be scored."""
    prompt = Prompt(0, np.array([1], np.int32))
    samples = []
    for index, reward in enumerate(rewards):
        ids = np.arange(index + 1, dtype=np.int32)
        sample = Sample(prompt, index, ids, ids.astype(np.float32), ids, "length" if index else "stop")
        sample.reward, sample.reward_error = (0.0, "took too long") if reward is None else (reward, "")
        samples.append(sample)
    return SampleGroup(prompt, samples)


def test_rewards_of_a_batch_are_those_of_its_scored_samples() -> None:
    values = rollout_metrics([group(1.0, 2.0, None), group(1.0, None, 1.0), group(None, None, 4.0)])
    assert values["rollout/reward_mean"] == pytest.approx(9 / 5)
    assert values["rollout/reward_std"] == pytest.approx(math.sqrt(6.8 / 5))
    assert values["rollout/reward_failed_share"] == pytest.approx(4 / 9)
    assert values["rollout/equal_reward_share"] == pytest.approx(2 / 3)
    # Lengths are of all samples.
    assert values["rollout/response_length_mean"] == 2
    assert values["rollout/response_length_max"] == 3
    assert values["rollout/truncated_share"] == pytest.approx(2 / 3)
    StepMetrics().update(values)  # all names are declared


def test_a_batch_without_a_scored_sample_has_no_reward() -> None:
    values = rollout_metrics([group(None, None)])
    assert values["rollout/reward_mean"] is values["rollout/reward_std"] is None
    assert values["rollout/reward_failed_share"] == values["rollout/equal_reward_share"] == 1.0


def test_rewards_by_source_where_a_batch_has_several() -> None:
    groups = [group(1.0, 2.0, None), group(5.0), group(None, None), group(7.0)]
    for one, source in zip(groups, ("math", "openai/gsm8k", "code", "math"), strict=True):
        one.prompt.metadata["data_source"] = source
    values = rollout_metrics(groups)
    found = {name: value for name, value in values.items() if name.startswith("reward/")}
    assert found == {
        "reward/source/math": pytest.approx(10 / 3),
        "reward/source/openai/gsm8k": 5.0,
        "reward/source/code": None,
    }
    StepMetrics().update(values)
    for few in ([groups[0], groups[3]], [groups[0], group(1.0)], [group(1.0)]):
        assert not [name for name in rollout_metrics(few) if name.startswith("reward/")]
