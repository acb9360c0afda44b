"""An estimate of a run: what it takes, how long a step is, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vespo.config import Config
from megatron_vespo.errors import UserError
from megatron_vespo.estimate.assumptions import Assumptions
from megatron_vespo.estimate.cluster import Cluster, make_cluster
from megatron_vespo.estimate.devices import Device
from megatron_vespo.estimate.durations import (
    Durations,
    Lengths,
    Work,
    generate_time,
    sample_lengths,
    step_work,
    swap_time,
    sync_time,
    train_time,
)
from megatron_vespo.estimate.host import disk, host_memory, offloaded
from megatron_vespo.estimate.parameters import Count, count_active, count_model
from megatron_vespo.estimate.server import ServerMemory, server_memory
from megatron_vespo.estimate.trainer import TrainerMemory, trainer_memory
from megatron_vespo.models.cost import sample_cost
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.plan.check import check_plan
from megatron_vespo.plan.sizes import Facts, Parallelism


@dataclass(frozen=True)
class Estimate:
    """All figures of a run.

    Attributes:
        cluster: Which GPUs do what.
        sizes: Of the groups of ranks.
        device: The GPU.
        count: Parameters.
        active: Parameters that work on a token.
        trainer: Memory of the trainer rank that needs most.
        server: Memory of a server; None where the run has none.
        host: Host memory in bytes, by use.
        disk: Disk in bytes, by use.
        lengths: Of the samples.
        work: FLOPs of a step.
        durations: Of a step; None where the run has no server.
        warnings: Of the parallel plan.
        assumptions: What went in.
    """

    cluster: Cluster
    sizes: Parallelism
    device: Device
    count: Count
    active: float
    trainer: TrainerMemory
    server: ServerMemory | None
    host: dict[str, float]
    disk: dict[str, float]
    lengths: Lengths
    work: Work
    durations: Durations | None
    warnings: list[str]
    assumptions: Assumptions

    @property
    def problems(self) -> list[str]:
        """Why it does not fit, and what to change; empty where it fits."""
        found = []
        room = self.device.memory_gib * 2**30
        left = self.assumptions.leftover_gib * 2**30 if self.cluster.shared else 0
        if self.trainer.total + left > room:
            found.append(
                f"a trainer GPU needs {(self.trainer.total + left) / 2**30:.1f} of {self.device.memory_gib:.1f} GiB: "
                + _advice(self.trainer, self.trainer.total + left - room)
            )
        if self.server is not None and self.server.tokens < self.lengths.longest + self.lengths.prompt:
            found.append(
                f"a server GPU has {self.server.budget / 2**30:.1f} GiB for {self.server.weights / 2**30:.1f} GiB of"
                f" weights, and room for {self.server.tokens:,} tokens of keys and values, fewer than one longest"
                " response: raise sglang.tp_size or sglang.mem_fraction_static, or set sglang.quantization: fp8"
            )
        return found


def _advice(memory: TrainerMemory, excess: float) -> str:
    """What to change where so many bytes do not fit, by what would be enough or takes most."""
    if not memory.recomputes and memory.activations > excess:
        return (
            f"activations take {memory.activations / 2**30:.1f}; set megatron.recompute_granularity: full"
            " (recompute_method: uniform, recompute_num_layers: 1)"
        )
    if memory.activations + memory.working > memory.states:
        return (
            "activations take most; lower training.max_tokens_per_microbatch if samples are short enough, or raise"
            " megatron.tensor_model_parallel_size with sequence_parallel"
        )
    experts = memory.parameters.experts > memory.parameters.dense
    layout = "expert_model_parallel_size" if experts else "tensor_model_parallel_size"
    return (
        f"weights, gradients and optimizer take most; use more GPUs (with megatron.use_distributed_optimizer: true they"
        f" share the optimizer), raise megatron.{layout} or pipeline_model_parallel_size, or set"
        " megatron.use_precision_aware_optimizer with exp_avg_dtype and exp_avg_sq_dtype: bfloat16, or"
        " megatron.optimizer_cpu_offload"
    )


def facts_of(architecture: Architecture) -> Facts:
    """What the parallel plan must know of a model."""
    return Facts(architecture.transformer_config(), architecture.vocab_size, architecture.context_length)


def estimate(
    config: Config,
    architecture: Architecture,
    device: Device,
    *,
    nodes: int,
    gpus_per_node: int = 8,
    server_nodes: int = 0,
    assumptions: Assumptions | None = None,
) -> Estimate:
    """Estimate a run.

    Args:
        config: Configuration, of objective rl or sft.
        architecture: The model.
        device: The GPU.
        nodes: All nodes.
        gpus_per_node: GPUs of each.
        server_nodes: Of the nodes, those that serve and do not train.
        assumptions: What cannot be known; the defaults otherwise.

    Raises:
        UserError: The parallel plan does not fit the model or the number of GPUs.
    """
    if config.objective == "rollout":
        raise UserError("objective: rollout trains no model; an estimate is of one that trains: rl or sft")
    assume = assumptions or Assumptions()
    facts, tied = facts_of(architecture), architecture.tied_embeddings
    cluster = make_cluster(config, nodes, gpus_per_node, server_nodes)
    warnings = check_plan(config, facts, cluster.ranks, cluster.ranks_per_node)
    sizes = Parallelism.of(config.megatron, cluster.ranks, cluster.ranks_per_node)
    count = count_model(facts, tied)
    trainer = trainer_memory(config, facts, tied, sizes, assume)
    server = server_memory(config, facts, count, device, assume) if cluster.servers else None
    lengths, cost = sample_lengths(config, assume), sample_cost(architecture)
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    work = step_work(config, cost, samples, lengths)
    durations = None
    if server is not None:
        train, bubble = train_time(config, facts, sizes, device, assume, work, lengths)
        generated = generate_time(config, facts, server, cluster.servers, device, assume, lengths, cost(1))
        swap = swap_time(offloaded(trainer), device, assume) if cluster.shared else 0.0
        sync = sync_time(config, count, cluster, device, assume)
        durations = _durations(config, lengths, samples, work, generated, (train, bubble), sync, swap, sizes, device)
    return Estimate(
        cluster,
        sizes,
        device,
        count,
        count_active(facts, tied),
        trainer,
        server,
        host_memory(config, count, trainer, cluster),
        disk(config, count),
        lengths,
        work,
        durations,
        warnings,
        assume,
    )


def _durations(
    config: Config,
    lengths: Lengths,
    samples: int,
    work: Work,
    generated: tuple[float, float, float, float, float],
    trained: tuple[float, float],
    sync: float,
    swap: float,
    sizes: Parallelism,
    device: Device,
) -> Durations:
    decode, tail, prefill, batch, iteration = generated
    train, bubble = trained
    generate = max(decode, tail) + prefill
    serial = train + sync + swap
    step = max(generate, serial) if config.rollout.max_staleness else generate + serial
    return Durations(
        generate,
        decode,
        tail,
        batch,
        iteration,
        train,
        bubble,
        sync,
        swap,
        step,
        samples * lengths.total / step,
        work.model / train / (sizes.ranks * device.bf16_tflops * 1e12),
    )
