"""The sections of a run's configuration, typed and validated. ``config_file`` reads them from YAML. No torch here.

Three sections are not ours: ``megatron:`` takes any field of Megatron-Core's TransformerConfig, OptimizerConfig and
DistributedDataParallelConfig, ``sglang:`` any SGLang server argument, each under upstream's own name; and the model's
architecture is read from the Hugging Face ``config.json``, never typed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_vespo.upstream import megatron_fields, nearest


class Section(BaseModel):
    """Base of all sections: unknown keys and wrong types are errors; the docstring of a field is its help text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class RunSection(Section):
    """The run and its folder, ``<folder>/<name>``."""

    name: str = Field(min_length=1)
    """Name of the run; its folder holds config.yaml, metrics.jsonl, rollouts/, checkpoints/, logs/, summary.md."""
    folder: str = "runs"
    """Where run folders are made."""
    seed: int = 1
    """Seeds weights (random initialisation), prompt order and, through SGLang's random_seed, sampling."""
    overwrite: bool = False
    """Replace the run folder of an earlier run with this name."""
    resume: Literal["never", "auto"] | int = "never"
    """`auto` goes on from the newest checkpoint of this run, or starts it where there is none yet; a number goes on
    from the checkpoint of that step; `never` starts a new run. The same as --resume."""
    stuck_timeout: float = Field(default=1800.0, gt=0)
    """Seconds that a rank may stay in one place of the loop before the job ends, naming the rank and the place. Longer
    than the slowest rollout batch, evaluation or save."""


class ModelSection(Section):
    """The policy. Its architecture is what ``config.json`` in the Hugging Face folder says."""

    hf_path: str
    """Hugging Face checkpoint folder: config.json, tokenizer and *.safetensors."""
    initialize: Literal["hf", "random"] = "hf"
    """`hf` loads the safetensors; `random` ignores them and draws new weights (pretraining)."""
    layer_spec: Literal["local", "transformer_engine"] = "local"
    """`local` is torch-native and runs anywhere; `transformer_engine` needs a GPU."""
    fp8_scope: Literal["experts", "all"] = "experts"
    """Where megatron.fp8 is on: in the experts' matrix products alone, while attention and the rest stay in bfloat16,
    or in all linear layers. Router, embedding and output layer never are."""
    make_vocab_size_divisible_by: int = Field(default=128, ge=1)
    """The vocabulary is padded to a multiple of this times the tensor-parallel size, as in Megatron-LM."""


class ServerSection(Section):
    """Where SGLang runs. Without ``url`` the trainer starts a server of its own and stops it at the end."""

    url: str | list[str] | None = None
    """Address of a running server, http://host:port, or a list of them: groups are spread over them, and all get every
    push. They must serve the same architecture. One that does not answer is left out until it does."""
    url_file: str | None = None
    """Instead: a file with one address a line, or a folder of such files, read anew at every push. Servers join and
    leave by it; `python -m megatron_vespo.serve` writes it."""
    router: str | None = None
    """Instead: address of an sglang-router. Requests go through it, weights to the workers that it names."""
    balance: Literal["least_loaded", "round_robin"] = "least_loaded"
    """Which of several servers gets the next group."""
    hang_timeout: float = Field(default=60.0, gt=0)
    """Seconds without any answer, while requests are in flight, after which a server's health is asked; one that does
    not answer that either counts as dead."""
    max_restarts: int = Field(default=3, ge=0)
    """Times that one of the run's own servers is started again after it died or hung, without a finished step between.
    """
    python: str | None = None
    """Interpreter of SGLang's own environment; default: the trainer's."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the server that is started."""
    host: str = "127.0.0.1"
    """Address that the server binds to. One that other machines reach gets an API key, a new one for each run."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the servers' API key: of running ones, or instead of a new one."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the server, the next ones of the node 10 apart; default: free ones."""
    startup_timeout: float = Field(default=600.0, gt=0)
    """Seconds until a server that is not ready is given up."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.url, list) and len({url.rstrip("/") for url in self.url}) != len(self.url):
            raise ValueError(f"url: {self.url} names a server twice")
        if self.url == []:
            raise ValueError("url: an empty list; leave it out for a server of the run's own")
        named = [name for name in ("url", "url_file", "router") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)}: say in one way where the servers are")
        return self

    @property
    def is_own(self) -> bool:
        """Whether the run starts servers of its own."""
        return self.named_by is None

    @property
    def named_by(self) -> str | None:
        """The field that says where running servers are."""
        return next((name for name in ("url", "url_file", "router") if getattr(self, name) is not None), None)

    @property
    def urls(self) -> list[str]:
        """Addresses of running servers; none where the run starts its own."""
        return [self.url] if isinstance(self.url, str) else self.url or []


class PlacementSection(Section):
    """Which GPUs train and which serve, where the run starts its own servers."""

    mode: Literal["disaggregated", "colocate"] = "disaggregated"
    """`disaggregated`: the servers have devices of their own, those of the node after the trainer's, and weights reach
    them over a process group. `colocate`: trainer and servers share the same devices in turns; each gives its memory up
    for the other's turn, and weights are handed over in the device's memory (weight_sync.transport: tensor).
    Synchronous training only."""
    servers_per_node: int = Field(default=1, ge=1)
    """Servers that are started on each node with trainer ranks. One takes sglang.tp_size * pp_size devices, times
    dp_size without data-parallel attention."""


class RolloutSection(Section):
    """Sampling from the policy with SGLang."""

    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts (groups) of one rollout batch."""
    samples_per_prompt: int = Field(default=8, ge=1)
    """Responses to each prompt: the group that advantages are relative to."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest response, in tokens."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens; default: what the model's context leaves beside max_new_tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the trainer's log-probabilities are of the same tempered distribution."""
    stop_token_ids: list[int] = []
    """Token ids that end a response, besides the model's own end-of-sequence token."""
    max_staleness: int = Field(default=0, ge=0)
    """S: rollout batches that generation may run ahead of training. 0: synchronous. No token is older than (S + 1) * N
    - 1 optimizer steps when it is trained on, N being training.minibatches_per_step; that is asserted."""
    over_sampling: float = Field(default=0.0, ge=0, le=1)
    """Share of further prompts beside prompts_per_step that are sampled, so that a batch need not wait for its longest
    responses: it takes the groups finished first, a group passed over is waited for in a later batch. Short responses
    come first, so that batches are biased towards them."""
    filter_equal_groups: int = Field(default=0, ge=0)
    """Most groups of a batch that are dropped because their rewards are all equal, so that further prompts take their
    places (DAPO's dynamic sampling); beyond that number such groups are kept. 0: off."""
    behavior_logprobs: Literal["rollout", "recompute", "both"] = "rollout"
    """mu: `rollout` is what SGLang reported when it sampled the token; `recompute` is the trainer's own forward pass
    over the fresh batch, pi_old, which hides the mismatch between the engines; `both` keeps mu and pi_old apart: the W
    of vespo stays pi / mu, clipping looks at pi / pi_old, corrections at pi_old / mu, and metrics have each part."""
    save_batches: bool = False
    """Keep every rollout batch whole, as rollouts/batch_000001.msgpack in the run folder, written before training on
    it; always on with objective rollout."""
    replay: str | None = None
    """Objective rl: a folder of saved rollout batches to train on in the order of their numbers, training.steps of
    them, without a server; data and evaluation are not used. Other settings than theirs of temperature,
    prompts_per_step or samples_per_prompt are refused."""
    concurrency: int = Field(default=512, ge=1)
    """Requests in flight at once."""
    request_timeout: float = Field(default=600.0, gt=0)
    """Seconds until a generation request that has not been answered fails the run."""
    server: ServerSection = ServerSection()


class DataSection(Section):
    """Prompts: jsonl files, one object a line with ``prompt``, ``label`` and ``metadata``."""

    train: str | None = None
    """Training prompts (objectives rl and rollout) or texts (sft: ``prompt`` and ``response``, or ``text``)."""
    evaluation: dict[str, str] = {}
    """Held-out prompt files by the name that their metrics get."""
    shuffle: bool = True
    """Reshuffle the training data in every epoch, by run.seed."""


class RewardSection(Section):
    """The verifiable reward."""

    function: str = "exact_match"
    """A built-in name, ``path/to/file.py:function`` or ``package.module:function``; called with a Sample, in a worker
    process."""
    workers: int = Field(default=2, ge=1)
    """Processes that score samples."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds that scoring one sample may take. Its worker is then killed, and the sample is not trained on."""
    max_failed_share: float = Field(default=0.5, ge=0, le=1)
    """Share of a batch's samples that may fail to be scored (an exception, a crash, a timeout); more end the run."""


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


class WeightSyncSection(Section):
    """How new weights reach SGLang after each rollout batch."""

    transport: Literal["broadcast", "delta", "disk", "tensor"] | None = None
    """`broadcast` over a process group with the servers (gloo on CPU, NCCL on GPU); `delta` over the same group, only
    what changed bit for bit since the last push, for a copy of the weights in rank 0's host memory; `disk` writes an HF
    folder that the servers read; `tensor` hands over memory of the device that both sides share (placement.mode:
    colocate). Default: `tensor` with colocate, `broadcast` otherwise."""
    bucket_megabytes: int = Field(default=512, ge=1)
    """Weights put together at a time; rank 0 holds up to three times as much while it receives, checks and sends. With
    `tensor` every rank holds twice as much beside that during a push."""
    pause: Literal["retract", "in_place", "abort"] = "retract"
    """What happens to requests in flight during a push. `retract`: they wait, their keys and values are computed anew
    with the new weights, and every later token is exactly the new policy's. `abort`: the server gives back what they
    have and they are sent again as continuations, exact too. `in_place`: they go on with the keys and values of the old
    weights; cheapest, but their tokens are of neither policy alone, though log mu is still what they were sampled
    with."""
    verify: Literal["checksum", "none"] = "checksum"
    """`checksum` compares fingerprints of all tensors, taken from the trainer's and from the servers' memory, after
    every push; a mismatch is an error, or with `delta` a push of all weights. A server that changes weights on purpose
    (quantisation) needs `none`."""


class EvaluationSection(Section):
    """Scoring the prompts of ``data.evaluation``."""

    interval: int = Field(default=0, ge=0)
    """Steps between evaluations; 0: only before the first and after the last step. With objective rollout, whose
    weights never change, only before the first."""
    samples_per_prompt: int = Field(default=1, ge=1)
    """Responses to each prompt; accuracy is their mean reward (avg@k)."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Use the first so many prompts of each set."""


class CheckpointSection(Section):
    """What is saved: checkpoints to resume from in ``checkpoints/``, Hugging Face folders in ``hf/``."""

    interval: int = Field(default=0, ge=0)
    """Steps between checkpoints, the last step's included; 0: only when SIGTERM or SIGINT ends the run early."""
    keep: int = Field(default=2, ge=1)
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    asynchronous: bool = False
    """Write files while training goes on, for a copy of weights and optimizer state in host memory."""
    hf_interval: int = Field(default=0, ge=0)
    """Steps between Hugging Face folders; 0: only after the last step."""


class HealthSection(Section):
    """The health panel: what it warns of, and when it ends the run. docs/health.md has the conditions."""

    enabled: bool = True
    """Measure, diagnose and warn at every step."""
    warn: dict[str, float] = {}
    """Other thresholds of conditions by name, for example `mismatch: 0.01`."""
    stop_when: list[str] | dict[str, Annotated[int, Field(ge=1)]] = ["silent"]
    """Conditions that end the run, after a checkpoint and with an error; a mapping says after how many steps in a row,
    for example `{silent: 5, mismatch: 1}`. `[]`: none does."""
    token_limit: float = Field(default=3.0, gt=0)
    """|log pi - log mu| (nats) above which a token counts as an outlier and is written to health/."""
    router_flips: bool = False
    """Ask SGLang which experts it chose and count where the trainer chooses others (models with experts). A server of
    yours needs --enable-return-routed-experts."""
    tokens_written: int = Field(default=20, ge=0)
    """Outliers of a step that are written, the worst first."""


class PreflightSection(Section):
    """One small rollout scored by the trainer before the first step: would anything be learned?"""

    enabled: bool = True
    """Do it, in resumed runs too (objective rl with a server)."""
    prompts: int = Field(default=8, ge=1)
    """The first so many training prompts; they stay in the training stream too."""
    samples_per_prompt: int = Field(default=4, ge=1)
    """Responses to each."""
    min_phi: float = Field(default=0.3, ge=0, le=1)
    """Refuse to start where the mean weight (E[phi]) predicted for a response of mean length is below this."""
    force: bool = False
    """Start all the same."""
    only: bool = False
    """Do nothing else; the run's folder is <name>.preflight then. The same as --preflight-only."""


class LoggingSection(Section):
    """What is shown and kept of each step."""

    console_interval: int = Field(default=1, ge=1)
    """Steps between lines on the console; metrics.jsonl holds every step."""
    tensorboard: bool = True
    """Write TensorBoard scalars."""
    rollout_groups: int = Field(default=2, ge=0)
    """Sampled groups a step written to rollouts/ as text."""


class Config(Section):
    """A run's whole configuration."""

    objective: Literal["rl", "sft", "rollout"] = "rl"
    """`rl`: the VESPO loop; `sft`: supervised next-token training of the same model on the same scaffold; `rollout`:
    generate, score and evaluate without a trainer, with the weights that the server loads from model.hf_path."""
    run: RunSection
    model: ModelSection
    megatron: dict[str, Any] = {}
    """Any field of TransformerConfig, OptimizerConfig or DistributedDataParallelConfig, under its own name."""
    sglang: dict[str, Any] = {}
    """Any SGLang server argument, under its own name with underscores. With `quantization: fp8` and objective rl the
    trainer quantises what it pushes (docs/colocate.md)."""
    placement: PlacementSection = PlacementSection()
    rollout: RolloutSection = RolloutSection()
    data: DataSection = DataSection()
    reward: RewardSection = RewardSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    training: TrainingSection
    weight_sync: WeightSyncSection = WeightSyncSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    health: HealthSection = HealthSection()
    preflight: PreflightSection = PreflightSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = megatron_fields()
        for key in self.megatron:
            if known is not None and key not in known:
                raise ValueError(f"megatron.{key}: unknown key{nearest(key, known)}")
        samples = self.rollout.prompts_per_step * self.rollout.samples_per_prompt
        if self.objective == "rl" and samples % self.training.minibatches_per_step:
            raise ValueError(
                f"training.minibatches_per_step={self.training.minibatches_per_step} does not divide the {samples}"
                " samples of a step (rollout.prompts_per_step * rollout.samples_per_prompt)"
            )
        if self.algorithm.kl_coef and self.model.initialize != "hf":
            raise ValueError(
                "algorithm.kl_coef: the reference policy is that of model.hf_path; set model.initialize: hf"
            )
        if self.rollout.replay is not None and self.objective != "rl":
            raise ValueError(f"rollout.replay: batches are trained on, which objective {self.objective} does not do")
        if self.preflight.only and (self.objective != "rl" or self.rollout.replay is not None):
            raise ValueError("preflight.only: there is no pre-flight without a trainer and a server to sample from")
        if self.data.train is None and self.rollout.replay is None:
            raise ValueError("data.train: missing; name a jsonl file")
        return self

    @property
    def samples_from_server(self) -> bool:
        """Whether the run generates with SGLang."""
        return self.objective != "sft" and self.rollout.replay is None

    @property
    def shares_devices(self) -> bool:
        """Whether trainer and servers use the same devices in turns."""
        return self.placement.mode == "colocate" and self.objective == "rl" and self.samples_from_server

    @property
    def transport(self) -> Literal["broadcast", "delta", "disk", "tensor"]:
        """How weights are pushed."""
        return self.weight_sync.transport or ("tensor" if self.shares_devices else "broadcast")

    @property
    def quantises_pushes(self) -> bool:
        """Whether the servers sample from FP8 weights, which the trainer quantises."""
        return self.objective == "rl" and self.samples_from_server and self.sglang.get("quantization") == "fp8"

    @property
    def run_folder(self) -> Path:
        """Folder of this run."""
        return Path(self.run.folder) / (f"{self.run.name}.preflight" if self.preflight.only else self.run.name)
