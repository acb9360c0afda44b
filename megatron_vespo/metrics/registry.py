"""The one table of metrics: every name that may appear in a run's output, what it means, and how values combine.

A step may make several optimizer updates, each on a minibatch with its own values. ``StepMetrics`` combines them as the
table says. Names that are not in the table are errors, so that a typing mistake cannot start a new curve.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np

from megatron_vespo.algorithms.health import HEARD, LENGTH_BUCKETS, STALENESS_BUCKETS
from megatron_vespo.algorithms.importance import WeightSummaries


class Combine(StrEnum):
    """How the values of one step's minibatches become one value."""

    MEAN = "mean"
    MAX = "max"
    SUM = "sum"
    LAST = "last"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table.

    In a name ``<set>`` stands for an evaluation set's, ``<term>`` for one of reward.terms, ``<source>`` for a data
    source, ``<k>`` for a number.
    """

    name: str
    unit: str
    combine: Combine
    description: str


# Phases of a step that are timed, for ``perf/<phase>_time``.
PHASES: dict[str, str] = {
    "generate": "Waiting for the samples of this step",
    "train": "Forward, backward and optimizer steps, and recomputed log-probabilities",
    "sync": "Sending weights to the rollout engine",
    "turns": "Moving memory between trainer and servers that share devices",
    "evaluate": "Held-out evaluation",
    "checkpoint": "Saving checkpoints",
}

_MEAN, _MAX, _SUM, _LAST = Combine.MEAN, Combine.MAX, Combine.SUM, Combine.LAST

_PLAIN = (
    ("train/loss", "", _MEAN, "Loss of a minibatch, as differentiated."),
    ("train/accuracy", "share", _MEAN, "Share of target tokens that are the most likely token (supervised training)."),
    ("train/entropy", "nats", _MEAN, "Mean entropy of the policy at response tokens."),
    ("train/grad_norm", "", _MEAN, "Global gradient norm before clipping."),
    ("train/grad_norm_max", "", _MAX, "Largest gradient norm of the step's updates, before clipping."),
    ("train/learning_rate", "", _LAST, "Learning rate of the last update."),
    ("train/log_ratio_abs_mean", "nats", _MEAN, "Mean |log pi - log mu| of response tokens."),
    ("train/log_ratio_abs_max", "nats", _MAX, "Largest |log pi - log mu| of a response token."),
    ("train/kl_ref", "nats", _MEAN, "Mean KL estimate of response tokens from the reference policy (kl_coef > 0)."),
    ("vespo/log_w_drift_mean", "nats", _MEAN, "Mean log pi/pi_old of samples: staleness within the step."),
    ("vespo/log_w_drift_abs_mean", "nats", _MEAN, "Mean |log pi/pi_old| of samples."),
    (
        "vespo/log_w_mismatch_mean",
        "nats",
        _MEAN,
        "Mean log pi_old/mu of samples: mismatch of the engines, and staleness from before the step.",
    ),
    ("vespo/log_w_mismatch_abs_mean", "nats", _MEAN, "Mean |log pi_old/mu| of samples."),
    (
        "train/load_balancing_loss",
        "",
        _MEAN,
        "Router's aux_loss without its coefficient; 1 where experts are balanced.",
    ),
    ("train/seq_load_balancing_loss", "", _MEAN, "Router's seq_aux_loss; a packed microbatch counts as one sequence."),
    ("train/global_load_balancing_loss", "", _MEAN, "Router's global_aux_loss, over all data-parallel ranks."),
    (
        "train/z_loss",
        "nats^2",
        _MEAN,
        "Router's z-loss without its coefficient: mean squared log-sum-exp of its logits.",
    ),
    ("train/skipped_updates", "updates", _SUM, "Updates skipped because the gradient was NaN or infinite."),
    ("train/samples", "samples", _SUM, "Samples trained on."),
    ("train/tokens", "tokens", _SUM, "Prompt and response tokens trained on."),
    ("train/microbatches", "", _SUM, "Microbatches of each data-parallel rank."),
    (
        "train/lockstep_efficiency",
        "share",
        _MEAN,
        "Share of the data-parallel ranks' time not spent waiting, as planned.",
    ),
    ("train/policy_version", "updates", _LAST, "Optimizer steps taken since the starting policy."),
    ("rollout/reward_mean", "", _MEAN, "Mean reward of the step's samples, as far as they could be scored."),
    ("rollout/reward_std", "", _MEAN, "Standard deviation of the reward over the same samples."),
    (
        "rollout/reward_failed_share",
        "share",
        _MEAN,
        "Share of samples that could not be scored: the reward function failed, crashed or took too long.",
    ),
    (
        "reward/<term>",
        "",
        _MEAN,
        "Mean of one of reward.terms, without its weight, over the samples that it was asked of.",
    ),
    (
        "reward/source/<source>",
        "",
        _MEAN,
        "Mean reward of the samples of one data_source, as far as they could be scored; of a batch of several.",
    ),
    ("rollout/response_length_mean", "tokens", _MEAN, "Mean response length."),
    ("rollout/response_length_max", "tokens", _MAX, "Longest response."),
    (
        "rollout/inserted_tokens_mean",
        "tokens",
        _MEAN,
        "Mean number of tokens in a response that the policy did not sample: what tools said (rollout.generate).",
    ),
    (
        "rollout/generate_failed_share",
        "share",
        _MEAN,
        "Share of samples whose generate function failed (rollout.generate); they count as not scored too.",
    ),
    ("rollout/response_tokens", "tokens", _SUM, "Response tokens of the step's samples."),
    ("rollout/truncated_share", "share", _MEAN, "Share of responses cut at the length limit."),
    ("rollout/equal_reward_share", "share", _MEAN, "Share of groups whose rewards are all equal: no learning signal."),
    ("rollout/staleness_mean", "updates", _MEAN, "Mean staleness: updates between sampling and training."),
    ("rollout/staleness_max", "updates", _MAX, "Largest staleness."),
    ("rollout/dropped_groups", "groups", _SUM, "Groups dropped because all their rewards were equal."),
    ("rollout/restarted_groups", "groups", _SUM, "Groups passed over whose samples were drawn anew (over-sampling)."),
    ("perf/in_flight_mean", "requests", _MEAN, "Requests in flight, mean over the step's time."),
    ("perf/rollout_idle_time", "s", _SUM, "Time of the step in which no request was in flight: the servers idled."),
    ("perf/buffered_groups", "groups", _LAST, "Groups that were complete and not yet taken when the step ended."),
    ("perf/resubmitted_requests", "requests", _SUM, "Requests sent again because their server was lost."),
    ("perf/server_losses", "", _SUM, "Times that a server was lost: died, hung or became unreachable."),
    ("perf/sync_bytes", "bytes", _SUM, "Weights sent to each server (written to disk, with that transport)."),
    ("perf/sync_changed_share", "share", _MEAN, "Elements sent because they changed since the last push (delta)."),
    ("perf/sync_repairs", "", _SUM, "Pushes after which servers held other weights, so that all were sent (delta)."),
    ("perf/step_time", "s", _SUM, "Wall-clock time of the step."),
    ("perf/other_time", "s", _SUM, "Time of the step in none of its phases: writing, measuring, waiting."),
    (
        "perf/response_tokens_per_second",
        "tokens/s",
        _MEAN,
        "Response tokens of the step's samples per second of step time.",
    ),
    (
        "perf/train_flops",
        "FLOP",
        _SUM,
        "Operations of the updates by the model's equations: forward and backward of all samples, no recomputation.",
    ),
    ("perf/train_tflops_per_rank", "TFLOP/s", _MEAN, "The same per rank and second of train_time."),
    (
        "perf/mfu",
        "share",
        _MEAN,
        "Model FLOPs utilisation: train_tflops_per_rank over the GPU's dense bfloat16 peak, where it is known.",
    ),
    (
        "perf/gpu_memory_allocated_max",
        "bytes",
        _MAX,
        "Most GPU memory that tensors had in the step, on the rank that had most.",
    ),
    (
        "perf/gpu_memory_reserved_max",
        "bytes",
        _MAX,
        "Most GPU memory that torch held in the step, on the rank that held most.",
    ),
    ("perf/tokens_per_second", "tokens/s", _MEAN, "Prompt and response tokens trained on per second of step time."),
    (
        "eval/<set>/accuracy",
        "share",
        _LAST,
        "Mean reward on the held-out prompts: the share answered correctly where it is 0 or 1.",
    ),
    ("eval/<set>/accuracy_low", "share", _LAST, "Lower end of the accuracy's interval: bootstrap over problems."),
    ("eval/<set>/accuracy_high", "share", _LAST, "Upper end of the accuracy's interval."),
    ("eval/<set>/pass_at_<k>", "share", _LAST, "Unbiased estimate that one of k responses at least is correct."),
    ("eval/<set>/pass_at_<k>_low", "share", _LAST, "Lower end of the interval of pass@k: bootstrap over problems."),
    ("eval/<set>/pass_at_<k>_high", "share", _LAST, "Upper end of the interval of pass@k."),
    (
        "eval/<set>/reward_failed_share",
        "share",
        _LAST,
        "Share of held-out samples not scored; they count as 0.",
    ),
    ("eval/<set>/response_length_mean", "tokens", _LAST, "Mean response length on the held-out prompts."),
    ("eval/<set>/truncated_share", "share", _LAST, "Share of held-out responses cut at the length limit."),
)

# Fields of importance.WeightSummary, for all samples and by the sign of the advantage.
_WEIGHT = (
    ("log_w_mean", "nats", _MEAN, "Mean log W: drift of the policy from the behaviour policy."),
    ("log_w_abs_mean", "nats", _MEAN, "Mean |log W|."),
    ("log_w_abs_max", "nats", _MAX, "Largest |log W|."),
    ("log_w_infinite_share", "share", _MEAN, "Share of samples whose log W is infinite."),
    ("ess_w", "share", _MEAN, "Effective sample size of W, divided by the number of samples."),
    ("ess_phi", "share", _MEAN, "Effective sample size of phi, divided by the number of samples."),
    ("phi_mean", "", _MEAN, "Mean weight phi; near 0 the samples are hardly heard."),
    ("phi_small_share", "share", _MEAN, "Share of samples with phi < 0.1."),
)
# Fields of health.summarize_health that every group of samples has, and those that buckets of lengths have besides.
_HEALTH = (
    ("log_w_p05", "nats", "5 % of the samples have a log W of at most this."),
    ("log_w_p50", "nats", "Median of log W."),
    ("log_w_p95", "nats", "95 % of the samples have a log W of at most this."),
    ("clamp_share", "share", "Share of samples whose log W is above what the kernel takes."),
    ("kl_k1", "nats", "KL per token from mu to pi, as the mean of log mu - log pi; it may be negative."),
    ("kl_k3", "nats", "KL per token from mu to pi, by the estimator that is never negative."),
)
_HEALTH_OF_LENGTHS = (
    *((name, unit, text) for name, unit, _, text in _WEIGHT if name in HEARD),
    ("samples", "samples", "Number of samples."),
)
_HEALTH_OF_TOKENS = (
    ("kl_fresh", "nats", "KL per token (k3) of tokens of staleness 0: what trainer and sampler disagree about."),
    ("outlier_tokens", "tokens", "Tokens whose |log pi - log mu| is above health.token_limit; health/ has the worst."),
    ("outlier_share", "share", "The same as a share of all response tokens."),
    ("router_flip_rate", "share", "Experts that trainer and sampler chose differently, where routing is known."),
)
_SIGNS = {"": "", "_pos": " Samples with a positive advantage.", "_neg": " Samples with a negative advantage."}


def _build_table() -> dict[str, Metric]:
    rows = [Metric(*row) for row in _PLAIN]
    rows += [
        Metric(f"vespo/{n}{s}", unit, how, text + more) for n, unit, how, text in _WEIGHT for s, more in _SIGNS.items()
    ]
    rows += _health_rows()
    rows += [Metric(f"perf/{name}_time", "s", _SUM, f"{text}.") for name, text in PHASES.items()]
    return {row.name: row for row in rows}


def _health_rows() -> list[Metric]:
    """The ``health/...`` metrics: one value a step, of all its samples at once."""
    lengths = {f"_{name}": f" Responses {_up_to(high)} tokens." for name, high in LENGTH_BUCKETS}
    rows = [(n + s, unit, text + more) for n, unit, text in _HEALTH for s, more in (_SIGNS | lengths).items()]
    rows += [(n + s, unit, text + more) for n, unit, text in _HEALTH_OF_LENGTHS for s, more in lengths.items()]
    rows += [
        (f"staleness_{name}_share", "share", f"Share of tokens {_up_to(high)} updates old.")
        for name, high in STALENESS_BUCKETS
    ]
    return [Metric(f"health/{name}", unit, _LAST, text) for name, unit, text in (*rows, *_HEALTH_OF_TOKENS)]


def _up_to(high: float) -> str:
    """In words, a bucket that begins where the one before it ends."""
    return "of more" if math.isinf(high) else f"of up to {high:g}"


METRICS: dict[str, Metric] = _build_table()

_EVAL_NAME = re.compile(r"eval/[^/]+/(?P<field>[^/]+)")
_TERM_NAME = re.compile(r"reward/[^/]+")
_SOURCE_NAME = re.compile(r"reward/source/.+", re.DOTALL)  # rows may say whatever they like: openai/gsm8k
_PASS_AT = re.compile(r"^pass_at_\d+")


def metric(name: str) -> Metric:
    """The row for ``name``, as ``eval/<set>/accuracy`` is that for ``eval/gsm8k/accuracy``.

    Raises:
        ValueError: The table has no such name.
    """
    if _TERM_NAME.fullmatch(name):
        return METRICS["reward/<term>"]
    if _SOURCE_NAME.fullmatch(name):
        return METRICS["reward/source/<source>"]
    match = _EVAL_NAME.fullmatch(name)
    row = METRICS.get(f"eval/<set>/{_PASS_AT.sub('pass_at_<k>', match['field'])}" if match else name)
    if row is None:
        raise ValueError(f"unknown metric {name!r}; metrics are declared in megatron_vespo/metrics/registry.py")
    return row


class StepMetrics:
    """Collects the values of one step. ``None`` means "nothing to measure" and is skipped; NaN is kept and spreads."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, name: str, value: float | None) -> None:
        """Add one minibatch's value.

        Raises:
            ValueError: The name is not in the table.
        """
        metric(name)
        values = self._values.setdefault(name, [])
        if value is not None:
            values.append(float(value))

    def update(self, values: Mapping[str, float | None]) -> None:
        """Add several values."""
        for name, value in values.items():
            self.add(name, value)

    def result(self) -> dict[str, float | None]:
        """One value a name, combined as declared, in the order of first addition; None where only None was added."""
        return {name: _combine(metric(name).combine, values) for name, values in self._values.items()}


def _combine(how: Combine, values: list[float]) -> float | None:
    if not values:
        return None
    match how:
        case Combine.MEAN:
            return float(np.mean(values))
        case Combine.MAX:
            # Unlike Python's max, numpy's lets a NaN through from any position.
            return float(np.max(values))
        case Combine.SUM:
            return float(np.sum(values))
        case Combine.LAST:
            return values[-1]


def weight_metrics(summaries: WeightSummaries) -> dict[str, float | None]:
    """The ``vespo/...`` metrics of a minibatch."""
    parts = {"": summaries.all, "_pos": summaries.positive, "_neg": summaries.negative}
    return {f"vespo/{name}{sign}": value for sign, part in parts.items() for name, value in asdict(part).items()}


def phase_metrics(seconds: Mapping[str, float]) -> dict[str, float | None]:
    """The ``perf/<phase>_time`` metrics from ``Timers.seconds()``."""
    return {f"perf/{name}_time": value for name, value in seconds.items()}
