"""From configuration to objects: the wiring of a training run. What needs no trainer is wired in ``connect``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path

import torch

from megatron_vespo import parallel, recorders
from megatron_vespo.algorithms.methods import (
    make_advantages,
    make_aggregation,
    make_regularization,
    make_weighting,
)
from megatron_vespo.config import Config
from megatron_vespo.data.sft import SupervisedStream
from megatron_vespo.data.sources import read_texts
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.estimate.devices import peak_tflops
from megatron_vespo.loop import Algorithm
from megatron_vespo.megatron_options import microbatch_multiple
from megatron_vespo.metrics.measure import Values
from megatron_vespo.models.build import build_model, ddp_config, optimizer_config, transformer_config
from megatron_vespo.models.conversion import load_hf_weights
from megatron_vespo.models.cost import sample_cost
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.models.precision import packed_alignment
from megatron_vespo.panel import HealthPanel
from megatron_vespo.policy.checkpoint import save_hf
from megatron_vespo.policy.checkpoints import Checkpoints
from megatron_vespo.policy.policy import Policy
from megatron_vespo.record import Hardware, Place, Recorder
from megatron_vespo.saving import Saver
from megatron_vespo.schedule import Schedule
from megatron_vespo.weight_sync.turns import Turns


@dataclass(frozen=True)
class Trainer:
    """The policy with what saving and pushing it needs.

    Attributes:
        policy: Model and optimizer.
        exporter: Streams its weights under HF names.
        checkpoints: Where it is saved to be resumed.
    """

    policy: Policy
    exporter: HfExporter
    checkpoints: Checkpoints


def make_trainer(config: Config, architecture: Architecture, *, resumes: bool = False) -> Trainer:
    """Build the model, load its weights unless a checkpoint will be, wrap it for training. A collective."""
    section, model = config.megatron, config.model
    optimizer = optimizer_config(section)
    transformer = transformer_config(architecture, section, model.layer_spec, model.fp8_scope)
    chunks = build_model(
        architecture,
        transformer,
        layer_spec=model.layer_spec,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
    )
    anchored = config.objective == "rl" and config.algorithm.kl_coef != 0
    if model.initialize == "hf" and (anchored or not resumes):
        load_hf_weights(chunks, architecture, HfReader(model.hf_path))
    updates = config.training.steps * (config.training.minibatches_per_step if config.objective == "rl" else 1)
    policy = Policy(
        chunks,
        ddp_config=ddp_config(section),
        optimizer_config=optimizer,
        total_steps=updates,
        warmup_steps=config.training.lr_warmup_steps,
        decay_style=config.training.lr_decay_style,
        vocab_size=architecture.vocab_size,
        temperature=config.rollout.temperature if config.objective == "rl" else 1.0,
        alignment=packed_alignment(transformer),
    )
    if anchored:
        policy.keep_reference()
    exporter = HfExporter(chunks, architecture, config.weight_sync.bucket_megabytes * 2**20, policy.finish_param_gather)
    checkpoints = Checkpoints(
        config.run_folder / "checkpoints",
        policy,
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
        seed=config.run.seed,
    )
    return Trainer(policy, exporter, checkpoints)


def make_saver(
    config: Config,
    trainer: Trainer,
    data_state: Callable[[], bytes | None],
    stop_requested: Callable[[], bool],
    message: Callable[[str], None],
    turns: Turns | None = None,
) -> Saver:
    """What is saved, and when."""

    def save(step: int) -> None:
        save_hf(trainer.exporter, config.run_folder / "hf" / f"step_{step:06d}", Path(config.model.hf_path))

    return Saver(
        trainer.checkpoints, config.checkpoint, config.training.steps, save, data_state, stop_requested, message, turns
    )


def make_schedule(config: Config, architecture: Architecture) -> Schedule:
    """How long, and in what pieces."""
    training = config.training
    return Schedule(
        training.steps,
        training.minibatches_per_step,
        training.max_tokens_per_microbatch,
        microbatch_multiple(config.megatron),
        sample_cost(architecture),
        training.max_skipped_updates,
        # Saved batches may be of any age.
        None
        if config.rollout.replay is not None
        else (config.rollout.max_staleness + 1) * training.minibatches_per_step - 1,
    )


def make_algorithm(config: Config) -> Algorithm:
    """Advantages, weights, and what the loss is divided by.

    Raises:
        UserError: The configuration names something unknown, or what does not go together.
    """
    section, behavior = config.algorithm, config.rollout.behavior_logprobs
    return Algorithm(
        make_advantages(section),
        make_weighting(section, knows_old=behavior == "both"),
        make_aggregation(section),
        make_regularization(section),
        behavior,
        max_response=config.rollout.max_new_tokens,
    )


def make_recorder(
    config: Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    facts: dict[str, str],
    at: Place,
    resumed_after: int = 0,
) -> Recorder:
    """Console, sinks and summary on rank 0; a recorder that only keeps time elsewhere."""
    profiler = recorders.make_profiler(config, parallel.rank(), parallel.mark_model_ranges)
    hardware = _hardware()
    if parallel.is_main():
        return recorders.make_recorder(config, architecture, tokenizer, facts, at, resumed_after, profiler, hardware)
    return Recorder(
        config.training.steps,
        None,
        (),
        None,
        config.run_folder,
        facts,
        at=at,
        profiler=profiler,
        hardware=hardware,
        resumed_after=resumed_after,
    )


def _hardware() -> Hardware:
    """What metrics say of the trainer's devices."""
    if not torch.cuda.is_available():
        return Hardware(parallel.world_size())
    return Hardware(parallel.world_size(), peak_tflops(torch.cuda.get_device_name()), _gpu_memory)


def _gpu_memory() -> Values:
    """Peaks since the last call, of the rank that has the highest. A collective."""
    own = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    torch.cuda.reset_peak_memory_stats()
    allocated, reserved = zip(*parallel.gather_values(own, tuple[int, int]), strict=True)
    return {
        "perf/gpu_memory_allocated_max": float(max(allocated)),
        "perf/gpu_memory_reserved_max": float(max(reserved)),
    }


def make_health(config: Config, tokenizer: Tokenizer, algorithm: Algorithm, warn: Callable[[str], None]) -> HealthPanel:
    """What is watched at every step."""
    # Kernels that clamp log W call the limit so.
    params = algorithm.weighting.params
    limit = asdict(params).get("log_w_limit") if is_dataclass(params) and not isinstance(params, type) else None
    return HealthPanel(config.health, config.run_folder, tokenizer.decode, warn, limit)


def make_sft_stream(
    config: Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    announce: Callable[[str], None] = lambda text: None,
) -> SupervisedStream:
    """Texts to learn, the same on every rank."""
    examples, stages = read_texts(config.data, tokenizer, architecture.context_length, announce)
    return SupervisedStream(examples, config.run.seed, config.data.shuffle, stages)
