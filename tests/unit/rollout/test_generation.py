from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scripted import answer, with_client

from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.rollout import generation
from megatron_vespo.rollout.generation import generate_group, generate_to_end
from megatron_vespo.rollout.protocol import ServerError
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import Prompt, Sample, SampleGroup

PROMPT = Prompt(7, np.array([1, 2], np.int32), label="4")


class Scorer:
    """Scores by a function."""

    def __init__(self, reward: Callable[[Sample], float]) -> None:
        self._reward = reward

    async def score(self, sample: Sample) -> float:
        return self._reward(sample)


def run_group(reward: Callable[[Sample], float], n: int = 3, finished: list[Sample] | None = None) -> SampleGroup:
    return with_client(
        lambda body: answer([5, 6]),
        lambda client: generate_group(
            client,
            PROMPT,
            n,
            SamplingParams(4),
            lambda ids: "/".join(map(str, ids)),
            Scorer(reward),
            finished=finished,
        ),
    )


def test_a_group_is_sampled_decoded_and_scored() -> None:
    group = run_group(lambda sample: sample.index + len(sample.text))
    assert [sample.name for sample in group.samples] == ["7/0", "7/1", "7/2"]
    assert [sample.reward for sample in group.samples] == [3.0, 4.0, 5.0]
    assert all(sample.text == "5/6" and sample.prompt is PROMPT for sample in group.samples)


def test_finished_samples_are_kept_and_told_as_they_come() -> None:
    kept = run_group(lambda sample: 9.0, n=2).samples[1]
    finished = [kept]
    group = run_group(lambda sample: 1.0, finished=finished)
    assert [sample.index for sample in group.samples] == [0, 1, 2] and group.samples[1] is kept
    assert len(finished) == 3


def test_a_sample_that_cannot_be_scored_says_why() -> None:
    def failing(sample: Sample) -> float:
        raise RewardFailure("it hangs")

    assert [(s.reward, s.reward_error) for s in run_group(failing, n=1).samples] == [(0.0, "it hangs")]


def test_an_aborted_response_is_resumed_with_its_own_versions() -> None:
    requests: list[dict[str, Any]] = []
    parts = [
        answer([5, 6], version="3", reason="abort", log_probs=[-1, -2]),
        answer([], reason="abort", spans=[]),
        answer([7], version="4", reason="stop", log_probs=[-3]),
    ]
    response = with_client(
        lambda body: parts[len(requests) - 1],
        lambda client: generate_to_end(client, PROMPT.input_ids, SamplingParams(4)),
        requests,
    )
    assert response.response_ids.tolist() == [5, 6, 7] and response.log_mu.tolist() == [-1, -2, -3]
    assert response.weight_versions.tolist() == [3, 3, 4] and response.finish_reason == "stop"
    assert [request["input_ids"] for request in requests] == [[1, 2], [1, 2, 5, 6], [1, 2, 5, 6]]
    assert [request["sampling_params"]["max_new_tokens"] for request in requests] == [4, 2, 2]


def test_an_abort_after_the_last_token_is_the_length_limit() -> None:
    aborted = answer([5, 6], reason="abort")
    response = with_client(lambda body: aborted, lambda client: generate_to_end(client, [1], SamplingParams(2)))
    assert response.finish_reason == "length"


def test_endless_aborts_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "RESUME_PAUSE_SECONDS", 0)
    aborted = answer([], reason="abort", spans=[])
    with pytest.raises(ServerError, match="without getting a token"):
        with_client(lambda body: aborted, lambda client: generate_to_end(client, [1], SamplingParams(2)))
