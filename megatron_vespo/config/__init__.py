"""The sections of a run's configuration, typed and validated. ``config_file`` reads them from YAML. No torch here.

Three sections are not ours: ``megatron:`` takes any field of Megatron-Core's TransformerConfig, OptimizerConfig and
DistributedDataParallelConfig, ``sglang:`` any SGLang server argument, each under upstream's own name; and the model's
architecture is read from the Hugging Face ``config.json``, never typed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from megatron_vespo.config.data import DataSection as DataSection
from megatron_vespo.config.data import ReasoningGymSection as ReasoningGymSection
from megatron_vespo.config.data import SourceSection as SourceSection
from megatron_vespo.config.learning import AlgorithmSection as AlgorithmSection
from megatron_vespo.config.learning import EvaluationSection as EvaluationSection
from megatron_vespo.config.learning import EvaluationSetSection as EvaluationSetSection
from megatron_vespo.config.learning import RewardSection as RewardSection
from megatron_vespo.config.learning import TrainingSection as TrainingSection
from megatron_vespo.config.run import CheckpointSection as CheckpointSection
from megatron_vespo.config.run import HealthSection as HealthSection
from megatron_vespo.config.run import LoggingSection as LoggingSection
from megatron_vespo.config.run import ModelSection as ModelSection
from megatron_vespo.config.run import PreflightSection as PreflightSection
from megatron_vespo.config.run import ProfileSection as ProfileSection
from megatron_vespo.config.run import RunSection as RunSection
from megatron_vespo.config.run import WandbSection as WandbSection
from megatron_vespo.config.sampling import PlacementSection as PlacementSection
from megatron_vespo.config.sampling import RolloutSection as RolloutSection
from megatron_vespo.config.sampling import ServerSection as ServerSection
from megatron_vespo.config.sampling import WeightSyncSection as WeightSyncSection
from megatron_vespo.config.section import Section as Section
from megatron_vespo.upstream import megatron_fields, nearest


class Config(Section):
    """A run's whole configuration."""

    objective: Literal["rl", "sft", "rollout"] = "rl"
    """`rl`: the VESPO loop; `sft`: supervised next-token training of the same model on the same scaffold; `rollout`:
    generate, score and evaluate without a trainer, with the weights that the server loads from model.hf_path."""
    run: RunSection
    model: ModelSection
    megatron: dict[str, Any] = {}
    """Any field of Megatron-Core's TransformerConfig, OptimizerConfig or DistributedDataParallelConfig, under its own
    name."""
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
    profile: ProfileSection = ProfileSection()

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
        unknown = set(self.evaluation.sets) - set(self.data.evaluation)
        if unknown:
            name = min(unknown)
            raise ValueError(
                f"evaluation.sets.{name}: data.evaluation has no such set{nearest(name, self.data.evaluation)}"
            )
        if self.data.train is None and self.rollout.replay is None:
            raise ValueError("data.train: missing; name a jsonl or parquet file, or another source")
        if self.data.curriculum is not None and self.objective == "sft":
            raise ValueError("data.curriculum: objective sft draws all its texts at all times; leave it out")
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
