"""What travels through the loop. No torch here: these types are read by every floor.

A worked example, two samples for one prompt of three tokens::

    prompt = Prompt(index=7, input_ids=[5, 9, 2], label="4")
    Sample(prompt, index=0, response_ids=[8, 4, 1], log_mu=[-.2, -1.1, -.1], weight_versions=[3, 3, 4], ...)
    Sample(prompt, index=1, response_ids=[1],       log_mu=[-2.3],           weight_versions=[4], ...)

Token ``response_ids[t]`` was sampled by the weights ``weight_versions[t]`` with log-probability ``log_mu[t]``. The
first sample began under policy version 3 and ended under version 4; trained at policy version 6 its staleness is 3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
ExpertArray = NDArray[np.int16]

UNKNOWN_EXPERT = -1

FINISH_STOP = "stop"
FINISH_LENGTH = "length"
FINISH_ABORT = "abort"

DATA_SOURCE = "data_source"
"""Key of a prompt's metadata, as verl's files spell it: where the prompt is from."""

GENERATE_FAILED = "rollout.generate: "
"""How the ``reward_error`` of a sample begins whose generate function failed."""


@dataclass(slots=True)
class Prompt:
    """One prompt as it was drawn from the prompt stream.

    Attributes:
        index: Position in the endless prompt stream; the order of admission, unique within a run.
        input_ids: Token ids, shape [P], P >= 1.
        label: What the reward function compares with (the ground truth), often the answer.
        metadata: Whatever else the data file said of this prompt; JSON-like values.
    """

    index: int
    input_ids: IntArray
    label: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def data_source(self) -> str:
        """What its row says, or else the name of its source or evaluation set; empty for a prompt of neither."""
        return str(self.metadata.get(DATA_SOURCE, ""))


@dataclass(slots=True)
class Sample:
    """One response to a prompt, by the behaviour policy mu.

    Attributes:
        prompt: The prompt answered.
        index: Number of this response within its group, from 0.
        response_ids: Sampled token ids, shape [R]; R may be 0. A stop token that was sampled is part of it. What others
            put between them (tools) is in ``inserted_ids``: everything that is counted, weighed or trained on is the
            policy's own.
        log_mu: Log-probability (nats) of each token under the distribution it was really sampled from, temperature
            included, shape [R], float32.
        weight_versions: Policy version that sampled each token, shape [R].
        log_old: Log-probability (nats) of each token under the trainer's policy as this step began, shape [R], float32;
            None where it is not kept apart from log_mu.
        log_ref: The same under the reference policy; None without one.
        finish_reason: ``stop``, ``length`` or ``abort``.
        text: The response as text, special tokens kept; for rewards and people, never tokenised again.
        reward: Score of the response; 0 where it could not be scored.
        advantage: Set by ``algorithms.advantages`` once the group is complete.
        reward_error: Why it could not be scored: the reward function failed, crashed or took too long. Such a sample
            has advantage 0 and counts for nothing in its group. Empty otherwise.
        reward_terms: Values of the rewards of which it is the weighted sum, by name; empty where it is none.
        routed_experts: Experts that the sampler chose in the forward pass that gave each token its distribution, which
            is that of the token before it: shape [R, layers, experts a token], every layer of the model, in any order;
            UNKNOWN_EXPERT throughout a token whose routing is not known. None: nothing is known.
        inserted_ids: Token ids that the policy did not sample but saw, shape [K]; None: there are none.
        inserted_before: For each of them the number of sampled tokens that stand before it, ascending, shape [K].
    """

    prompt: Prompt
    index: int
    response_ids: IntArray
    log_mu: FloatArray
    weight_versions: IntArray
    finish_reason: str
    text: str = ""
    reward: float = 0.0
    advantage: float = 0.0
    reward_error: str = ""
    routed_experts: ExpertArray | None = None
    log_old: FloatArray | None = None
    log_ref: FloatArray | None = None
    reward_terms: dict[str, float] = field(default_factory=dict)
    inserted_ids: IntArray | None = None
    inserted_before: IntArray | None = None

    @property
    def name(self) -> str:
        """How error messages and logs call this sample: prompt index and number in its group."""
        return f"{self.prompt.index}/{self.index}"

    @property
    def total_length(self) -> int:
        """Prompt, response and inserted tokens together."""
        return len(self.prompt.input_ids) + len(self.response_ids) + self.inserted_length

    @property
    def inserted_length(self) -> int:
        """K, tokens that others put into the response."""
        return 0 if self.inserted_ids is None else len(self.inserted_ids)

    @property
    def sequence_ids(self) -> IntArray:
        """All tokens after the prompt in their order, shape [R + K]."""
        if self.inserted_ids is None or self.inserted_before is None:
            return self.response_ids
        return np.insert(self.response_ids, self.inserted_before, self.inserted_ids)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each sampled token stands in ``sequence_ids``, shape [R]."""
        places = np.arange(len(self.response_ids))
        if self.inserted_before is None:
            return places
        return places + np.searchsorted(self.inserted_before, places, side="right")

    def staleness(self, policy_version: int) -> int:
        """Optimizer steps between the oldest weights that sampled a token of it and ``policy_version``."""
        return policy_version - int(self.weight_versions.min()) if len(self.weight_versions) else 0


@dataclass(slots=True)
class SampleGroup:
    """All samples of one prompt; the unit of admission, buffering and advantage estimation."""

    prompt: Prompt
    samples: list[Sample]

    @property
    def has_equal_rewards(self) -> bool:
        """Whether no sample that could be scored is better than another: nothing can be learned from the group."""
        return len({sample.reward for sample in self.samples if not sample.reward_error}) <= 1


@dataclass(slots=True)
class Progress:
    """Where a run stands. Everything the loop needs to go on, besides weights and optimizer state.

    Attributes:
        step: Rollout batches trained on.
        policy_version: Optimizer steps taken, skipped ones included; version 0 is the starting policy.
        skipped_in_a_row: Optimizer steps skipped since the last good one.
    """

    step: int = 0
    policy_version: int = 0
    skipped_in_a_row: int = 0
