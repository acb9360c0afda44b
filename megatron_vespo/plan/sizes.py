"""What a plan is about: facts of the model, sizes of the groups of ranks, layers of the pipeline stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vespo.config import Config
from megatron_vespo.megatron_options import DEFAULT_EXPERT_TENSOR_PARALLEL_SIZE, data_parallel_size


@dataclass(frozen=True, slots=True)
class Facts:
    """What the plan must know of a model.

    Attributes:
        transformer: TransformerConfig fields that the architecture fixes (``Architecture.transformer_config()``).
        vocab_size: Rows of the embedding in the checkpoint.
        context_length: Most tokens of prompt and response together.
    """

    transformer: Mapping[str, Any]
    vocab_size: int
    context_length: int

    @property
    def layers(self) -> int:
        """Transformer layers."""
        return self.transformer["num_layers"]

    @property
    def query_groups(self) -> int:
        """Heads of keys and values."""
        return self.transformer.get("num_query_groups") or self.transformer["num_attention_heads"]

    @property
    def experts(self) -> int:
        """Experts of a layer; 0 in a dense model."""
        return self.transformer.get("num_moe_experts") or 0

    @property
    def moe_layers(self) -> list[bool]:
        """Whether each layer has experts."""
        frequency = self.transformer.get("moe_layer_freq", [1] * self.layers)
        return [bool(self.experts and has) for has in frequency]


@dataclass(frozen=True, slots=True)
class Parallelism:
    """Sizes of the groups of ranks.

    Attributes:
        ranks: Of the job.
        ranks_per_node: Neighbours that share a node.
        tensor: Tensor parallel.
        pipeline: Stages.
        virtual: Chunks of each stage.
        expert: Expert parallel.
        expert_tensor: Tensor parallel within an expert.
    """

    ranks: int
    ranks_per_node: int
    tensor: int
    pipeline: int
    virtual: int
    expert: int
    expert_tensor: int

    @classmethod
    def of(cls, megatron: Mapping[str, Any], ranks: int, ranks_per_node: int) -> Parallelism:
        """Read a ``megatron:`` section.

        Raises:
            UserError: The sizes do not fit the number of ranks.
        """
        data_parallel_size(megatron, ranks)

        def size(name: str, default: int = 1) -> int:
            return int(megatron.get(name) or default)

        return cls(
            ranks,
            ranks_per_node,
            size("tensor_model_parallel_size"),
            size("pipeline_model_parallel_size"),
            size("virtual_pipeline_model_parallel_size"),
            size("expert_model_parallel_size"),
            size("expert_tensor_parallel_size", DEFAULT_EXPERT_TENSOR_PARALLEL_SIZE),
        )

    @property
    def data(self) -> int:
        """Replicas of the dense weights."""
        return self.ranks // (self.tensor * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Replicas of each expert."""
        return self.ranks // (self.expert * self.expert_tensor * self.pipeline)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about a plan.

    Attributes:
        text: Names the field, its value and what would be right.
        fatal: The run could not start; otherwise it would be slow, or might stop later.
    """

    text: str
    fatal: bool = True


def samples_per_minibatch(config: Config) -> int:
    """Samples of one optimizer step, over all ranks."""
    if config.objective != "rl":
        return config.training.samples_per_step
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return samples // config.training.minibatches_per_step


def longest_sample(config: Config, facts: Facts) -> int:
    """Positions of the longest sample that the configuration allows; the last token is never fed."""
    room = facts.context_length - config.rollout.max_new_tokens
    prompt = min(config.rollout.max_prompt_tokens or room, room)
    return max(prompt + config.rollout.max_new_tokens - 1, 1)
