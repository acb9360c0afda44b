"""What the loop is wired to: the side of each part that it sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_vespo.metrics.measure import Values
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.policy.figures import Measured
from megatron_vespo.policy.policy import Policy
from megatron_vespo.record import Recorder
from megatron_vespo.schedule import Schedule
from megatron_vespo.types import Progress, Sample, SampleGroup


class RolloutSource(Protocol):
    """Where batches come from: SGLang, or files."""

    def start(self) -> None:
        """Begin, with the weights of policy version 0 pushed."""

    def next_batch(self) -> list[SampleGroup]:
        """The next scored groups, the same on every rank; none where the run shall stop."""
        ...

    def release(self) -> None:
        """Let new prompts in for the groups trained on."""

    def metrics(self) -> Values:
        """What happened since the last call; on rank 0."""
        ...


class Turns(Protocol):
    """Whose turn it is where trainer and servers share devices."""

    def train(self) -> None:
        """The trainer's. A push ends it, after which it is the servers'."""


class WeightPush(Protocol):
    """Where new weights go."""

    def push(self, version: int) -> Values:
        """Sample with the current weights from now on, as this policy version; returns metrics of the push."""
        ...


class Evaluation(Protocol):
    """Held-out accuracy."""

    def due(self, step: int, last_step: int) -> bool:
        """Whether to evaluate after this step."""
        ...

    def run(self, step: int) -> Values:
        """The metrics after a step."""
        ...


class Saving(Protocol):
    """Checkpoints, and whether the run shall stop."""

    def stopping(self) -> bool:
        """Whether somebody asked the run to stop; the same on every rank."""
        ...

    def after_step(self, progress: Progress) -> None:
        """Save what is due."""

    def leave(self, progress: Progress) -> None:
        """The run ends, in order: save what is not saved yet."""


class Health(Protocol):
    """Whether off-policy training is sound, and what speaks against it."""

    def begin(self, samples: Sequence[Sample]) -> None:
        """A step's samples as they were drawn."""

    def observe(self, minibatch: Sequence[Sample], measured: Measured, policy_version: int) -> None:
        """What was measured of a minibatch under this policy version."""

    def conclude(self, step: int, metrics: StepMetrics) -> Values:
        """Further metrics of the finished step; warns of what they and the others say."""
        ...

    def hopeless(self) -> bool:
        """Whether the run shall end; the same on every rank."""
        ...

    def raise_if_hopeless(self) -> None:
        """Say why."""


class PreflightCheck(Protocol):
    """Whether anything would be learned."""

    def run(self, policy: Policy, schedule: Schedule, policy_version: int, teller: Recorder) -> None:
        """Check it with a small rollout of the weights pushed; a UserError where it would not."""
