"""Sections about the run as a whole: its folder, model, checkpoints, and what is watched and shown."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron_vespo.config.section import Section


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
    """Do nothing else; the run's folder is ``<name>.preflight`` then. The same as --preflight-only."""


class WandbSection(Section):
    """Weights & Biases: the metrics of metrics.jsonl under the same names, and the configuration."""

    mode: Literal["off", "offline", "online"] = "off"
    """`online` sends them (W&B's own WANDB_API_KEY or login); `offline` writes files into the run folder, for
    `wandb sync`."""
    project: str = "megatron-vespo"
    """W&B project that the run goes to."""
    entity: str | None = None
    """W&B user or team; default: the one logged in."""
    group: str | None = None
    """W&B group that the run belongs to."""
    tags: list[str] = []
    """W&B tags of the run."""


class ProfileSection(Section):
    """A window of steps under a profiler; docs/metrics.md."""

    steps: list[Annotated[int, Field(ge=1)]] | None = None
    """First and last step, for example [3, 4]; none by default. Leave out the first steps, which warm up."""
    ranks: list[Annotated[int, Field(ge=0)]] = [0]
    """Which ranks are profiled."""
    tool: Literal["torch", "nsys"] = "torch"
    """`torch` writes profile/rank_0_steps_3_4.json.gz, a Chrome trace; `nsys` starts and stops CUDA's profiler and sets
    NVTX ranges, ours and Megatron's, for `nsys profile --capture-range=cudaProfilerApi`."""
    shapes: bool = False
    """torch: keep the shapes of operators' inputs."""
    stacks: bool = False
    """torch: keep Python stacks; traces get large."""
    memory: bool = False
    """torch: keep allocations of memory."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is not None and (len(self.steps) != 2 or self.steps[0] > self.steps[1]):
            raise ValueError(f"steps: {self.steps} must be the first and the last step, such as [3, 4]")
        return self


class LoggingSection(Section):
    """What is shown and kept of each step."""

    console_interval: int = Field(default=1, ge=1)
    """Steps between lines on the console; metrics.jsonl holds every step."""
    tensorboard: bool = True
    """Write TensorBoard scalars."""
    wandb: WandbSection = WandbSection()
    rollout_groups: int = Field(default=2, ge=0)
    """Sampled groups a step written to rollouts/ as text, evenly from the first to the last one trained on."""
