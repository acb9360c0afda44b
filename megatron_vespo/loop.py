"""The algorithm, on every rank. Data flow of one step::

    prompts -> SGLang --token ids, log mu, versions--> buffer -> groups -> advantages
                 ^                                                             |
                 |                                              N minibatches  v
            weight sync <---- policy version + N <---- optimizer <---- packed microbatches -> log pi -> W -> phi -> loss

Synchronous training is ``max_staleness: 0``; with more, the rollout service simply keeps generating meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from megatron_vespo import parallel
from megatron_vespo.algorithms.loss import Aggregation
from megatron_vespo.algorithms.weights import WeightKernel
from megatron_vespo.batching import MicrobatchPlan, plan_microbatches, split_minibatches
from megatron_vespo.metrics.measure import Values, minibatch_metrics, rollout_metrics, supervised_metrics
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.policy.objectives import NextToken, Objective, PolicyGradient, denominators
from megatron_vespo.policy.packing import packed_length
from megatron_vespo.policy.policy import Policy, Table
from megatron_vespo.record import Recorder
from megatron_vespo.types import Progress, Sample, SampleGroup


class RolloutSource(Protocol):
    """Where batches come from: SGLang, or files."""

    def start(self) -> None:
        """Begin, with the weights of policy version 0 pushed."""

    def next_batch(self) -> list[SampleGroup]:
        """The next scored groups, the same on every rank."""
        ...

    def release(self, n: int) -> None:
        """Let new prompts in for ``n`` groups trained on."""


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

    def run(self) -> Values:
        """The metrics."""
        ...


@dataclass(frozen=True)
class Algorithm:
    """What the loop optimises.

    Attributes:
        assign_advantages: Sets ``sample.advantage`` of complete groups.
        kernel: Weight kernel.
        params: Its parameters.
        aggregation: Divisor of the loss.
        recompute_log_mu: Take mu from the trainer's own forward pass over the fresh batch.
    """

    assign_advantages: Callable[[Sequence[SampleGroup]], None]
    kernel: WeightKernel[object]
    params: object
    aggregation: Aggregation
    recompute_log_mu: bool

    def objective(self, minibatch: Sequence[Sample]) -> Objective:
        """The loss of one global minibatch."""
        return PolicyGradient(self.kernel, self.params, self.aggregation, denominators(minibatch))


@dataclass(frozen=True)
class Schedule:
    """How long, and in what pieces.

    Attributes:
        steps: Rollout batches (RL) or optimizer steps (SFT).
        minibatches_per_step: N, optimizer steps on each rollout batch.
        max_tokens_per_microbatch: Packing limit.
        microbatch_multiple: The number of microbatches is a multiple of this.
        cost: Time that a sequence of so many tokens takes, in any unit; it balances the ranks.
        hf_interval: Steps between Hugging Face folders; 0: only after the last.
    """

    steps: int
    minibatches_per_step: int
    max_tokens_per_microbatch: int
    microbatch_multiple: int
    cost: Callable[[int], float]
    hf_interval: int

    def plan(self, samples: Sequence[Sample]) -> MicrobatchPlan:
        """Microbatches of a minibatch for all data-parallel ranks."""
        return plan_microbatches(
            [packed_length(sample) for sample in samples],
            parallel.data_parallel_size(),
            self.max_tokens_per_microbatch,
            self.cost,
            names=[sample.name for sample in samples],
            multiple_of=self.microbatch_multiple,
        )

    def hf_due(self, step: int) -> bool:
        """Whether to save after this step."""
        return step == self.steps or bool(self.hf_interval and step % self.hf_interval == 0)


def train_rl(
    policy: Policy,
    rollouts: RolloutSource,
    weight_sync: WeightPush,
    evaluator: Evaluation,
    algorithm: Algorithm,
    schedule: Schedule,
    recorder: Recorder,
    save: Callable[[int], None],
) -> Progress:
    """Train with reinforcement learning; every rank runs this."""
    progress = Progress()
    weight_sync.push(progress.policy_version)
    rollouts.start()
    recorder.record_start(evaluator.run())
    while progress.step < schedule.steps:
        metrics = StepMetrics()
        with recorder.timed("generate"):
            groups = rollouts.next_batch()
        algorithm.assign_advantages(groups)
        recorder.record_batch(progress.step + 1, groups, progress.policy_version)
        samples = [sample for group in groups for sample in group.samples]
        log_w: dict[str, float] = {}
        with recorder.timed("train"):
            if algorithm.recompute_log_mu:
                _recompute_log_mu(policy, samples, schedule)
            for minibatch in split_minibatches(samples, schedule.minibatches_per_step):
                table = _update(policy, minibatch, algorithm.objective(minibatch), schedule, metrics)
                metrics.update(minibatch_metrics(minibatch, table, progress.policy_version))
                log_w.update(zip((sample.name for sample in minibatch), table["log_w"].tolist(), strict=True))
                progress.policy_version += 1
        with recorder.timed("sync"):
            metrics.update(weight_sync.push(progress.policy_version))
        rollouts.release(len(groups))  # only now admit new prompts: this bounds the staleness

        progress.step += 1
        metrics.update(rollout_metrics(groups))
        metrics.add("train/policy_version", progress.policy_version)
        if evaluator.due(progress.step, schedule.steps):
            with recorder.timed("evaluate"):
                metrics.update(evaluator.run())
        recorder.record_step(progress.step, metrics, groups, log_w)
        if schedule.hf_due(progress.step):
            save(progress.step)
    return progress


def train_sft(
    policy: Policy,
    batches: Iterator[list[Sample]],
    schedule: Schedule,
    recorder: Recorder,
    save: Callable[[int], None],
) -> Progress:
    """Supervised next-token training; every rank runs this and draws the same batches."""
    progress = Progress()
    while progress.step < schedule.steps:
        metrics = StepMetrics()
        minibatch = next(batches)
        with recorder.timed("train"):
            table = _update(policy, minibatch, NextToken(denominators(minibatch)), schedule, metrics)
        metrics.update(supervised_metrics(minibatch, table))
        progress = replace(progress, step=progress.step + 1, policy_version=progress.policy_version + 1)
        recorder.record_step(progress.step, metrics)
        if schedule.hf_due(progress.step):
            save(progress.step)
    return progress


def _update(
    policy: Policy, minibatch: Sequence[Sample], objective: Objective, schedule: Schedule, metrics: StepMetrics
) -> Table:
    """One optimizer step on one global minibatch."""
    plan = schedule.plan(minibatch)
    table = policy.forward_backward(minibatch, plan.ranks[parallel.data_parallel_rank()], objective)
    result = policy.optim_step()
    metrics.update(
        {
            "train/grad_norm": result.grad_norm,
            "train/grad_norm_max": result.grad_norm,
            "train/learning_rate": result.learning_rate,
            **{f"train/{name}": value for name, value in result.router_losses.items()},
            "train/microbatches": plan.num_microbatches,
            "train/lockstep_efficiency": plan.efficiency,
        }
    )
    return table


def _recompute_log_mu(policy: Policy, samples: Sequence[Sample], schedule: Schedule) -> None:
    """Replace the sampler's log-probabilities by the trainer's own, under the weights that begin this step."""
    plan = schedule.plan(samples)
    for sample, log_mu in zip(
        samples, policy.log_probs(samples, plan.ranks[parallel.data_parallel_rank()]), strict=True
    ):
        sample.log_mu = log_mu
