"""The algorithm, on every rank. Data flow of one step::

    prompts -> SGLang --token ids, log mu, versions--> buffer -> groups -> advantages
                 ^                                                             |
                 |                                              N minibatches  v
            weight sync <---- policy version + N <---- optimizer <---- packed microbatches -> log pi -> W -> phi -> loss

Synchronous training is ``max_staleness: 0``; with more, the rollout service simply keeps generating meanwhile. A
resumed run is the same loop with the progress of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_vespo import parallel
from megatron_vespo.algorithms.aggregation import Aggregation
from megatron_vespo.algorithms.loss import Regularization
from megatron_vespo.algorithms.weights import Ratios, Weighting
from megatron_vespo.batching import split_minibatches
from megatron_vespo.errors import UserError
from megatron_vespo.metrics.measure import minibatch_metrics, rollout_metrics, supervised_metrics
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.metrics.sinks import SampleScores
from megatron_vespo.parts import Evaluation, Health, PreflightCheck, RolloutSource, Saving, Turns, WeightPush
from megatron_vespo.policy.figures import Measured
from megatron_vespo.policy.objectives import NextToken, Objective, PolicyGradient, denominators, minibatch_ratios
from megatron_vespo.policy.policy import Policy
from megatron_vespo.record import Recorder
from megatron_vespo.schedule import Schedule
from megatron_vespo.types import Progress, Sample, SampleGroup


@dataclass(frozen=True)
class Algorithm:
    """What the loop optimises.

    Attributes:
        assign_advantages: Sets ``sample.advantage`` of complete groups.
        weighting: How much each token's gradient counts.
        aggregation: Divisor of the loss.
        regularization: KL and entropy terms.
        behavior_logprobs: Whether mu is the sampler's, the trainer's own, or both are kept.
        max_response: Longest response allowed, in tokens.
    """

    assign_advantages: Callable[[Sequence[SampleGroup]], None]
    weighting: Weighting
    aggregation: Aggregation
    regularization: Regularization
    behavior_logprobs: Literal["rollout", "recompute", "both"]
    max_response: int

    def weights_at_start(self, ratios: Ratios) -> Tensor:
        """Kappa of each token, shape [T], of fresh samples: the trainer's policy is pi_old, the ratios are to mu."""
        zero, none = torch.zeros_like(ratios.log_ratio), torch.zeros_like(ratios.log_w)
        if self.behavior_logprobs == "both":
            ratios = replace(ratios, log_drift=zero, sum_log_drift=none, log_mismatch=ratios.log_ratio)
        elif self.behavior_logprobs == "recompute":
            ratios = replace(ratios, log_ratio=zero, log_drift=zero, log_w=none, sum_log_drift=none)
        return self.weighting.of_minibatch(ratios)

    def objective(self, policy: Policy, minibatch: Sequence[Sample], schedule: Schedule) -> PolicyGradient:
        """The loss of one global minibatch; a collective where the weights depend on all of it."""
        weighting = self.weighting
        if weighting.needs_minibatch:
            log_pi = policy.log_probs(minibatch, schedule.rank_plan(minibatch))
            weighting = weighting.measured(minibatch_ratios(minibatch, log_pi))
        sizes = denominators(minibatch, self.max_response)
        return PolicyGradient(weighting, self.aggregation, sizes, self.regularization)


def train_rl(
    policy: Policy,
    rollouts: RolloutSource,
    turns: Turns,
    weight_sync: WeightPush,
    evaluator: Evaluation,
    algorithm: Algorithm,
    schedule: Schedule,
    recorder: Recorder,
    saving: Saving,
    health: Health,
    preflight: PreflightCheck,
    progress: Progress,
) -> None:
    """Train with reinforcement learning from ``progress`` on; every rank runs this."""
    with recorder.timed("sync"):
        weight_sync.push(progress.policy_version)
    rollouts.start()
    preflight.run(policy, schedule, progress.policy_version, recorder)
    with recorder.timed("evaluate"):
        accuracy = evaluator.run(0) if progress.step == 0 else {}
    recorder.record_start(accuracy)
    while progress.step < schedule.steps and not saving.stopping() and not health.hopeless():
        metrics = StepMetrics()
        with recorder.timed("generate"):
            groups = rollouts.next_batch()
        if not groups:  # asked to stop while waiting
            break
        algorithm.assign_advantages(groups)
        recorder.record_batch(progress.step + 1, groups, progress.policy_version)
        samples = [sample for group in groups for sample in group.samples]
        health.begin(samples)
        scores: dict[str, SampleScores] = {}
        turns.train()
        with recorder.timed("train"):
            _score(policy, samples, algorithm, schedule)
            for minibatch in split_minibatches(samples, schedule.minibatches_per_step):
                schedule.check_staleness(minibatch, progress.policy_version)
                objective = algorithm.objective(policy, minibatch, schedule)
                measured = _update(policy, minibatch, objective, schedule, metrics, progress)
                objective.check(measured.table)
                metrics.update(minibatch_metrics(minibatch, measured.table, progress.policy_version - 1))
                health.observe(minibatch, measured, progress.policy_version - 1)
                scores.update(_scores(minibatch, measured, progress.policy_version - 1))
        with recorder.timed("sync"):
            metrics.update(weight_sync.push(progress.policy_version))
        rollouts.release()  # only now admit new prompts: this bounds the staleness

        progress.step += 1
        metrics.update(rollout_metrics(groups))
        metrics.add("train/policy_version", progress.policy_version)
        if evaluator.due(progress.step, schedule.steps):
            with recorder.timed("evaluate"):
                metrics.update(evaluator.run(progress.step))
        metrics.update(rollouts.metrics())
        metrics.update(health.conclude(progress.step, metrics))
        recorder.record_step(progress.step, metrics, groups, scores)
        with recorder.timed("checkpoint"):
            saving.after_step(progress)
    saving.leave(progress)
    health.raise_if_hopeless()


def train_sft(
    policy: Policy,
    batches: Iterator[list[Sample]],
    schedule: Schedule,
    recorder: Recorder,
    saving: Saving,
    progress: Progress,
) -> None:
    """Supervised next-token training from ``progress`` on; every rank runs this and draws the same batches."""
    recorder.record_start({})
    while progress.step < schedule.steps and not saving.stopping():
        metrics = StepMetrics()
        minibatch = next(batches)
        with recorder.timed("train"):
            measured = _update(policy, minibatch, NextToken(denominators(minibatch)), schedule, metrics, progress)
        metrics.update(supervised_metrics(minibatch, measured.table))
        progress.step += 1
        recorder.record_step(progress.step, metrics)
        with recorder.timed("checkpoint"):
            saving.after_step(progress)
    saving.leave(progress)


def _update(
    policy: Policy,
    minibatch: Sequence[Sample],
    objective: Objective,
    schedule: Schedule,
    metrics: StepMetrics,
    progress: Progress,
) -> Measured:
    """One optimizer step on one global minibatch.

    Raises:
        UserError: The gradient was NaN or infinite once too often.
    """
    plan = schedule.plan(minibatch)
    measured = policy.forward_backward(minibatch, plan.ranks[parallel.data_parallel_rank()], objective)
    result = policy.optim_step()
    progress.policy_version += 1
    progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if result.skipped else 0
    if progress.skipped_in_a_row > schedule.max_skipped_updates:
        raise UserError(
            f"the gradient norm is {result.grad_norm}, and {progress.skipped_in_a_row} updates in a row were skipped"
            " for that (training.max_skipped_updates); the weights are as before them: lower megatron.lr or go back to"
            " an earlier checkpoint with --resume STEP"
        )
    metrics.update(
        {
            "train/grad_norm": result.grad_norm,
            "train/grad_norm_max": result.grad_norm,
            "train/learning_rate": result.learning_rate,
            "train/skipped_updates": float(result.skipped),
            **{f"train/{name}": value for name, value in result.router_losses.items()},
            "train/microbatches": plan.num_microbatches,
            "perf/train_flops": schedule.flops(minibatch),
            "train/lockstep_efficiency": plan.efficiency,
        }
    )
    return measured


def _scores(minibatch: Sequence[Sample], measured: Measured, policy_version: int) -> dict[str, SampleScores]:
    """What is written down of each sample beside its text, by name."""
    table, tokens = measured.table, measured.tokens
    rows = zip(minibatch, table["log_w"].tolist(), table["phi"].tolist(), tokens.log_pi, strict=True)
    return {sample.name: SampleScores(w, phi, log_pi, policy_version) for sample, w, phi, log_pi in rows}


def _score(policy: Policy, samples: Sequence[Sample], algorithm: Algorithm, schedule: Schedule) -> None:
    """What the trainer itself says of a fresh batch, under the weights that begin this step and under the reference."""
    recomputes, anchored = algorithm.behavior_logprobs != "rollout", algorithm.regularization.kl_coef != 0
    plan = schedule.rank_plan(samples) if recomputes or anchored else []
    if recomputes:
        for sample, log_old in zip(samples, policy.log_probs(samples, plan), strict=True):
            if algorithm.behavior_logprobs == "both":
                sample.log_old = log_old
            else:
                sample.log_mu = log_old
    if anchored:
        with policy.reference():
            for sample, log_ref in zip(samples, policy.log_probs(samples, plan), strict=True):
                sample.log_ref = log_ref
