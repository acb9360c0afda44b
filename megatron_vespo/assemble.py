"""From configuration to objects: the wiring of a training run. What needs no trainer is wired in ``connect``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Protocol

import torch
from megatron.core.utils import configure_nvtx_profiling

from megatron_vespo import connect, parallel
from megatron_vespo.algorithms.methods import (
    make_advantages,
    make_aggregation,
    make_regularization,
    make_weighting,
)
from megatron_vespo.config import Config
from megatron_vespo.connect import Connection
from megatron_vespo.data.sft import SupervisedStream
from megatron_vespo.data.sources import read_texts
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.estimate.devices import peak_tflops
from megatron_vespo.evaluation import NoEvaluation
from megatron_vespo.loop import Algorithm
from megatron_vespo.megatron_options import microbatch_multiple
from megatron_vespo.metrics.measure import Values
from megatron_vespo.models.build import build_model, ddp_config, optimizer_config, transformer_config
from megatron_vespo.models.conversion import load_hf_weights
from megatron_vespo.models.cost import sample_cost
from megatron_vespo.models.export import Exporter, HfExporter
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.models.precision import packed_alignment
from megatron_vespo.models.quantised import QuantisedExporter
from megatron_vespo.panel import HealthPanel
from megatron_vespo.parts import Evaluation, PreflightCheck, RolloutSource, WeightPush
from megatron_vespo.policy.checkpoint import save_hf
from megatron_vespo.policy.checkpoints import Checkpoints
from megatron_vespo.policy.policy import Policy
from megatron_vespo.preflight import NoPreflight, Preflight
from megatron_vespo.record import Hardware, Place, Recorder
from megatron_vespo.rollout.batches import list_batches
from megatron_vespo.rollout.own_servers import OwnServers
from megatron_vespo.rollout.replay import BatchReader, ReplayService
from megatron_vespo.rollout.service import RolloutService
from megatron_vespo.saving import Saver
from megatron_vespo.schedule import Schedule
from megatron_vespo.types import Prompt
from megatron_vespo.weight_sync.broadcast import BroadcastTransport
from megatron_vespo.weight_sync.delta import DeltaTransport
from megatron_vespo.weight_sync.disk import DiskTransport
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.sync import WeightSync
from megatron_vespo.weight_sync.tensor import SharedExporter, TensorTransport
from megatron_vespo.weight_sync.transport import Transport
from megatron_vespo.weight_sync.turns import SharedDevices, Turns
from megatron_vespo.weight_sync.verify import FileReports, GroupReports


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
    profiler = connect.make_profiler(config, parallel.rank(), configure_nvtx_profiling)
    hardware = _hardware()
    if parallel.is_main():
        return connect.make_recorder(config, architecture, tokenizer, facts, at, resumed_after, profiler, hardware)
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


class ResumableSource(RolloutSource, Protocol):
    """A source of batches that travels in checkpoints."""

    def state(self) -> bytes | None:
        """Where it stands, on rank 0; None elsewhere."""
        ...

    def restore(self, data: bytes) -> None:
        """Go on from there; before the start."""


@dataclass(frozen=True)
class Rollouts:
    """Where batches come from and weights go.

    Attributes:
        service: Rollout batches.
        evaluator: Held-out accuracy.
        weight_sync: Pushes.
        sampler: Samples for other purposes than training; None: there is no server.
        preflight_prompts: On rank 0, prompts of the pre-flight.
        turns: Whose turn it is on devices that trainer and servers share.
    """

    service: ResumableSource
    evaluator: Evaluation
    weight_sync: WeightPush
    sampler: RolloutService | None = None
    preflight_prompts: Sequence[Prompt] = ()
    turns: Turns = field(default_factory=Turns)


@dataclass(frozen=True)
class Link:
    """The connection to SGLang: rank 0 has it, the others have part in it.

    Attributes:
        connection: On rank 0; None elsewhere.
        turns: Whose turn it is on devices that trainer and servers share.
    """

    connection: Connection | None
    turns: Turns


def make_link(
    config: Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    own: OwnServers,
    stack: ExitStack,
    *,
    announce: Callable[[str], None] = lambda text: None,
    stop_requested: Callable[[], bool] = lambda: False,
    timed: Callable[[str], AbstractContextManager[None]] = lambda phase: nullcontext(),
) -> Link:
    """Connect to SGLang. A collective.

    Args:
        config: Configuration.
        architecture: Limits of prompts and ids.
        tokenizer: Texts.
        own: The servers that this rank started and, on rank 0, where those of all nodes are.
        stack: Takes what must be closed at the end.
        announce: Told, on rank 0, what people should know.
        stop_requested: Whether the run shall end.
        timed: Counts the time that a phase takes.
    """
    inputs: connect.Inputs | None = None
    connection: Connection | None = None

    def on_every() -> None:
        nonlocal inputs
        if parallel.is_main():
            inputs = connect.prepare(config, architecture, tokenizer, stack, announce)
        own.wait_ready()

    def on_main() -> None:
        nonlocal connection
        assert inputs is not None
        connection = connect.connect(
            config, architecture, tokenizer, inputs, own, stack, announce=announce, stop_requested=stop_requested
        )

    parallel.on_every(on_every)
    if not parallel.is_main():  # which watches its own with the others
        own.supervise(config.rollout.server, stack, logging.getLogger(__name__).warning)
    parallel.on_main(on_main)
    if not config.shares_devices:
        return Link(connection, Turns())
    return Link(connection, SharedDevices(None if connection is None else connection.fleet, own.gate, timed))


def make_rollouts(config: Config, link: Link, trainer: Trainer, stack: ExitStack) -> Rollouts:
    """Rollouts from connected servers, pushes to them.

    Args:
        config: Configuration.
        link: The servers.
        trainer: Whose weights are pushed.
        stack: Takes what must be closed at the end.
    """
    connection, turns = link.connection, link.turns
    turns.memory = trainer.policy.memory
    exporter: Exporter = trainer.exporter
    if config.quantises_pushes:
        exporter = QuantisedExporter(exporter)
    if config.transport == "tensor":
        exporter = SharedExporter(exporter)
    engine, fleet, servers, transport = None, None, None, None
    if connection is not None:
        engine, fleet, servers = connection.engine, connection.fleet, Servers()
        transport = _make_transport(config, servers)
    shares = config.shares_devices
    reports = FileReports(config.run_folder / "weights") if shares else GroupReports()
    weight_sync = WeightSync(
        exporter,
        fleet,
        servers,
        transport,
        pause=None if shares else config.weight_sync.pause,
        verify=None if config.weight_sync.verify == "none" else reports,
        turns=turns,
    )
    service = RolloutService(engine, parallel.broadcast_bytes, weight_sync.push_again)
    stack.callback(weight_sync.close)
    stack.callback(service.close)
    prompts = () if connection is None else connection.preflight
    return Rollouts(service, connect.make_evaluator(config, service, connection), weight_sync, service, prompts, turns)


def make_replay(config: Config, architecture: Architecture) -> Rollouts:
    """Saved batches in the place of SGLang. A collective; it fails if the first of them does not fit."""
    rollout, reader = config.rollout, None
    assert rollout.replay is not None
    if parallel.is_main():
        files = list_batches(rollout.replay)[: config.training.steps]
        reader = BatchReader(
            files, rollout.prompts_per_step, rollout.samples_per_prompt, rollout.temperature, architecture.vocab_size
        )

    def check_first() -> None:
        assert reader is not None
        reader.read(0)

    parallel.on_main(check_first)
    replay = ReplayService(reader, parallel.broadcast_bytes)
    return Rollouts(replay, NoEvaluation(), replay)


def make_preflight(config: Config, rollouts: Rollouts, algorithm: Algorithm) -> PreflightCheck:
    """What is checked before the first step."""
    if rollouts.sampler is None or not (config.preflight.enabled or config.preflight.only):
        return NoPreflight()
    return Preflight(
        config.preflight,
        rollouts.sampler,
        rollouts.preflight_prompts,
        connect.training_sampling(config),
        algorithm.weights_at_start,
        config.rollout.temperature,
        config.run_folder,
        rollouts.turns,
    )


def make_health(config: Config, tokenizer: Tokenizer, algorithm: Algorithm, warn: Callable[[str], None]) -> HealthPanel:
    """What is watched at every step."""
    # Kernels that clamp log W call the limit so.
    params = algorithm.weighting.params
    limit = asdict(params).get("log_w_limit") if is_dataclass(params) and not isinstance(params, type) else None
    return HealthPanel(config.health, config.run_folder, tokenizer.decode, warn, limit)


def _make_transport(config: Config, servers: Servers) -> Transport:
    match config.transport:
        case "tensor":
            return TensorTransport(servers)
        case "disk":
            return DiskTransport(servers, config.run_folder / "weights", Path(config.model.hf_path))
        case "delta":
            return DeltaTransport(servers, config.weight_sync.bucket_megabytes * 2**20)
    return BroadcastTransport(servers)


def make_sft_stream(
    config: Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    announce: Callable[[str], None] = lambda text: None,
) -> SupervisedStream:
    """Texts to learn, the same on every rank."""
    examples, stages = read_texts(config.data, tokenizer, architecture.context_length, announce)
    return SupervisedStream(examples, config.run.seed, config.data.shuffle, stages)
