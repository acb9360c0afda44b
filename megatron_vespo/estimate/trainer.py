"""Memory of a trainer rank: weights, gradients, optimizer, activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vespo.config import Config
from megatron_vespo.errors import UserError
from megatron_vespo.estimate.activations import Recompute, head_memory, in_flight, layer_memory, stage_activations
from megatron_vespo.estimate.assumptions import Assumptions
from megatron_vespo.estimate.parameters import Count, count_stages, layers_of_stages
from megatron_vespo.megatron_options import padded_vocab_size
from megatron_vespo.plan.sizes import Facts, Parallelism
from megatron_vespo.plan.stages import split_layers

_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2, "uint8": 1, "float8_e4m3fn": 1}
_STORED_REMAINDER = 2


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes a parameter.

    Attributes:
        weight: The weight itself.
        gradient: Its place in the gradient buffer.
        master: The optimizer's own copy of it.
        moments: Both of Adam's.
        quantised: Copies in FP8 that the FP8 linears keep, by rows and by columns.
        distributed: Whether master and moments are spread over the replicas.
    """

    weight: int
    gradient: int
    master: int
    moments: int
    quantised: int
    distributed: bool

    @classmethod
    def of(cls, megatron: Mapping[str, Any]) -> StateBytes:
        """Read a ``megatron:`` section.

        Raises:
            UserError: A dtype is unknown.
        """
        mixed = bool(megatron.get("bf16") or megatron.get("fp16"))
        weight = 2 if mixed else 4
        gradient = 4 if megatron.get("grad_reduce_in_fp32", True) else weight
        moments = 4 + 4 if megatron.get("optimizer", "adam") == "adam" else 4
        master = 4 if mixed else 0
        if megatron.get("use_precision_aware_optimizer"):
            moments = sum(_bytes_of(megatron, f"{name}_dtype") for name in ("exp_avg", "exp_avg_sq"))
            master = _bytes_of(megatron, "main_params_dtype")
            if megatron.get("bf16") and master == 4 and megatron.get("store_param_remainders", True):
                master = _STORED_REMAINDER  # the other half is the bfloat16 weight
        quantised = 2 if megatron.get("fp8") else 0
        return cls(weight, gradient, master, moments, quantised, bool(megatron.get("use_distributed_optimizer")))


def _bytes_of(megatron: Mapping[str, Any], field: str) -> int:
    name = str(megatron.get(field, "float32")).removeprefix("torch.")
    if name not in _BYTES:
        raise UserError(f"megatron.{field}: unknown dtype {name!r}; use one of {', '.join(_BYTES)}")
    return _BYTES[name]


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes of the rank that needs most.

    Attributes:
        stage: Its pipeline stage, from 0.
        parameters: On it.
        weights: Of the model.
        gradients: Gradient buffers.
        optimizer: Master weights and moments that are on the device.
        quantised: FP8 copies of weights.
        activations: Kept for the backward pass, all microbatches in flight.
        working: One layer's activations and their gradients while it is worked on.
        head: Log-probability head.
        reserved: CUDA, NCCL, workspaces, fragmentation.
        host_optimizer: Master weights and moments that are in host memory.
        recomputes: Whether whole layers are computed again.
    """

    stage: int
    parameters: Count
    weights: float
    gradients: float
    optimizer: float
    quantised: float
    activations: float
    working: float
    head: float
    reserved: float
    host_optimizer: float
    recomputes: bool

    @property
    def states(self) -> float:
        """Bytes that are there between steps."""
        return self.weights + self.gradients + self.optimizer + self.quantised

    @property
    def total(self) -> float:
        """Most bytes on the device: the head and a layer are worked on in turn."""
        return self.states + self.activations + max(self.working, self.head) + self.reserved


def trainer_memory(config: Config, facts: Facts, tied: bool, sizes: Parallelism, assume: Assumptions) -> TrainerMemory:
    """Memory of the rank that needs most.

    Raises:
        UserError: The layers cannot be split over the stages.
    """
    split = split_layers(config.megatron, facts.layers)
    counts = count_stages(facts, tied, split, padded_vocab(config, facts, sizes))
    numbers = layers_of_stages(split)
    stages = [
        _stage_memory(config, facts, sizes, assume, stage, counts[stage], numbers[stage]) for stage in range(len(split))
    ]
    return max(stages, key=lambda memory: memory.total)


def padded_vocab(config: Config, facts: Facts, sizes: Parallelism) -> int:
    """Rows of the embedding with padding."""
    return padded_vocab_size(facts.vocab_size, config.model.make_vocab_size_divisible_by, sizes.tensor)


def _stage_memory(
    config: Config,
    facts: Facts,
    sizes: Parallelism,
    assume: Assumptions,
    stage: int,
    count: Count,
    layer_numbers: list[int],
) -> TrainerMemory:
    megatron, each = config.megatron, StateBytes.of(config.megatron)
    parameters = count.on_rank(sizes)
    spread = 1 / sizes.data if each.distributed else 1
    spread_experts = 1 / sizes.expert_data if each.distributed else 1
    optimizer = (each.master + each.moments) * (spread * parameters.dense + spread_experts * parameters.experts)
    if each.gradient == 2 and each.master == 4:  # the optimizer steps on a float32 copy of its part of the gradients
        optimizer += 4 * (spread * parameters.dense + spread_experts * parameters.experts)
    offloaded = float(megatron.get("optimizer_offload_fraction") or 0) if megatron.get("optimizer_cpu_offload") else 0.0
    quantised = parameters.experts + (parameters.split if config.model.fp8_scope == "all" else 0)
    tokens, element = config.training.max_tokens_per_microbatch, each.weight
    if config.model.layer_spec == "transformer_engine":
        megatron = {"bias_activation_fusion": True, **megatron}
    layers = [
        layer_memory(facts, sizes, megatron, facts.moe_layers[number], element, assume.imbalance)
        for number in layer_numbers
    ]
    activations, working = stage_activations(
        layers, tokens, in_flight(sizes, stage), Recompute.of(megatron), sizes.virtual
    )
    last = stage == sizes.pipeline - 1
    vocab_of_rank = padded_vocab(config, facts, sizes) // sizes.tensor
    head = head_memory(tokens, facts.transformer["hidden_size"], vocab_of_rank, element) if last else 0
    return TrainerMemory(
        stage,
        parameters,
        weights=each.weight * parameters.total,
        gradients=each.gradient * parameters.total,
        optimizer=optimizer * (1 - offloaded),
        quantised=each.quantised * quantised,
        activations=activations,
        working=working,
        head=head,
        reserved=assume.reserved_gib * 2**30,
        host_optimizer=optimizer * offloaded,
        recomputes=Recompute.of(megatron).full,
    )
