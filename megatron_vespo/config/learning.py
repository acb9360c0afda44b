"""Sections about learning: rewards, algorithm, schedule, evaluation."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron_vespo.config.section import Section


class RewardTerm(Section):
    """One of several rewards that are added up."""

    function: str
    """As reward.function."""
    weight: float = Field(default=1.0, allow_inf_nan=False)
    """Its factor in the sum; may be negative."""
    params: dict[str, Any] = {}
    """As reward.params."""
    name: str = Field(default="", pattern=r"^[\w.-]*$")
    """Of its metric, ``reward/<name>``: letters, digits, ``_``, ``.`` and ``-``. Default: the function's name."""
    sources: list[str] | None = None
    """Only for prompts whose ``data_source`` is one of these: the name of their source or evaluation set, unless their
    line in the data has one. ``*`` stands for any text. Default: for all."""

    @property
    def label(self) -> str:
        """Its name, or its function's."""
        return self.name or self.function.rpartition(":")[2]


class RewardSection(Section):
    """The verifiable reward: one function, or several that are added up."""

    function: str = "exact_match"
    """A built-in name (math, exact_match, multiple_choice, code, reasoning_gym, format, overlong, truncated,
    http), ``path/to/file.py:function`` or ``package.module:function``; called with a Sample, in a worker process."""
    params: dict[str, Any] = {}
    """Further arguments of the function, by name (docs/rewards.md)."""
    terms: list[RewardTerm] = []
    """Instead of function: several rewards, whose weighted sum is the reward. Each has function, and may have weight,
    params, name, and sources."""
    workers: int = Field(default=2, ge=1)
    """Processes that score samples."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds that scoring one sample may take. Its worker is then killed, and the sample is not trained on."""
    max_failed_share: float = Field(default=0.5, ge=0, le=1)
    """Share of a batch's samples that may fail to be scored (an exception, a crash, a timeout); more end the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.terms:
            return self
        if {"function", "params"} & self.model_fields_set:
            raise ValueError("terms: not together with function and params; make the function one of the terms")
        for label, count in Counter(term.label for term in self.terms).items():
            if count > 1:
                raise ValueError(f"terms: {count} of them are called {label!r}; give each a name")
        if all(not term.weight for term in self.terms):
            raise ValueError("terms: every weight is 0")
        return self

    @property
    def spec(self) -> str:
        """How messages call the reward: the function, or the terms."""
        return " + ".join(term.label for term in self.terms) or self.function


class AlgorithmSection(Section):
    """Advantages, weight kernel and aggregation of the policy loss."""

    kernel: str = "vespo"
    """Method: vespo, reinforce, rloo, grpo, dapo, dr_grpo, gspo, sapo, cispo, topr, m2po, or one of your own,
    path/to/file.py:name or package.module:name of a WeightKernel."""
    kernel_params: dict[str, float] = {}
    """Parameters of the kernel, for vespo: c1_pos, c2_pos, c1_neg, c2_neg (or k_pos, lambda_pos, ...), log_w_limit,
    log_w_floor_pos."""
    corrections: dict[str, dict[str, float]] = {}
    """Further factors of the weight for the mismatch between the engines, with their parameters: tis, icepop, mis."""
    advantage: Literal["group_normalized", "leave_one_out"] | None = None
    """Advantage estimator over the samples of one prompt; default: the kernel's own."""
    normalize_std: bool | None = None
    """Divide advantages by the standard deviation of the group's rewards; default: as the kernel's paper does."""
    aggregation: (
        Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"] | None
    ) = None
    """Divisor of the loss: response tokens of the whole global minibatch; its samples; samples and each one's own
    length; or samples times rollout.max_new_tokens. Default: the kernel's own."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Coefficient of the KL divergence from the policy in model.hf_path; above 0 it takes a copy of the weights in host
    memory and a forward pass a step."""
    kl_estimator: Literal["k2", "k3"] = "k3"
    """`k3` is GRPO's; the gradient of `k2` is that of the reverse KL divergence."""
    entropy_coef: float = 0.0
    """Coefficient of the policy's entropy, which is made larger."""


class TrainingSection(Section):
    """How long, and in what pieces. Optimizer settings (lr, weight_decay, clip_grad, ...) are Megatron's."""

    steps: int = Field(ge=1)
    """Rollout batches to train on (objective rl) or to generate (objective rollout), or optimizer steps (objective
    sft)."""
    minibatches_per_step: int = Field(default=1, ge=1)
    """N: optimizer steps taken on each rollout batch."""
    samples_per_step: int = Field(default=64, ge=1)
    """Objective sft: texts of one optimizer step."""
    max_tokens_per_microbatch: int = Field(default=4096, ge=1)
    """Samples are packed without padding into microbatches of at most this many tokens."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "constant"
    """Learning-rate schedule from megatron.lr to megatron.min_lr, in optimizer steps (Megatron's scheduler)."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    max_skipped_updates: int = Field(default=3, ge=0)
    """Optimizer steps in a row that may be skipped because the gradient is NaN or infinite; one more ends the run."""


class EvaluationSetSection(Section):
    """How one set is sampled, where it differs from the others."""

    samples_per_prompt: int | None = Field(default=None, ge=1)
    """Instead of evaluation.samples_per_prompt."""
    temperature: float | None = Field(default=None, ge=0)
    """Instead of evaluation.temperature."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Instead of evaluation.top_p."""
    top_k: int | None = Field(default=None, ge=-1)
    """Instead of evaluation.top_k."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Instead of evaluation.max_new_tokens."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Instead of evaluation.max_prompts."""


class EvaluationSection(Section):
    """Scoring the prompts of ``data.evaluation``; docs/evaluation.md."""

    interval: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: only before the first and after the last step. With objective rollout, whose
    weights never change, only before the first."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses to each prompt; accuracy is their mean reward (avg@k)."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; 1 is off."""
    top_k: int = Field(default=-1, ge=-1)
    """Sample among the k likeliest tokens; -1 is off."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Longest response, in tokens; default: rollout.max_new_tokens."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Use the first so many prompts of each set."""
    sets: dict[str, EvaluationSetSection] = {}
    """Other values for single sets of data.evaluation, for example `aime24: {samples_per_prompt: 32, top_p: 0.95}`."""
    correct_from: float = 1.0
    """Reward from which a response is correct, for pass@k."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Level of the intervals, which are made by the bootstrap over problems."""
    keep_answers: bool = True
    """Write every answer to evaluation/ in the run folder."""

    def of_set(self, name: str) -> EvaluationSetSection:
        """How a set is sampled; max_new_tokens and max_prompts may be None, as they may here."""
        own = self.sets.get(name, EvaluationSetSection())
        fields = {key: getattr(self, key) if value is None else value for key, value in own.model_dump().items()}
        return EvaluationSetSection(**fields)
