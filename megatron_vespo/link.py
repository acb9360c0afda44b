"""Where batches come from and weights go: the trainer's link to SGLang, or saved batches in its place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_vespo import connect, parallel
from megatron_vespo.assemble import Trainer
from megatron_vespo.config import Config
from megatron_vespo.connect import Connection
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.evaluation import NoEvaluation
from megatron_vespo.inputs import Inputs, prepare, training_sampling
from megatron_vespo.loop import Algorithm
from megatron_vespo.models.export import Exporter
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.quantised import QuantisedExporter
from megatron_vespo.parts import Evaluation, PreflightCheck, RolloutSource, WeightPush
from megatron_vespo.preflight import NoPreflight, Preflight
from megatron_vespo.rollout.batches import list_batches
from megatron_vespo.rollout.own_servers import OwnServers
from megatron_vespo.rollout.replay import BatchReader, ReplayService
from megatron_vespo.rollout.service import RolloutService
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
    inputs: Inputs | None = None
    connection: Connection | None = None

    def on_every() -> None:
        nonlocal inputs
        if parallel.is_main():
            inputs = prepare(config, architecture, tokenizer, stack, announce)
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
        training_sampling(config),
        algorithm.weights_at_start,
        config.rollout.temperature,
        config.run_folder,
        rollouts.turns,
    )


def _make_transport(config: Config, servers: Servers) -> Transport:
    match config.transport:
        case "tensor":
            return TensorTransport(servers)
        case "disk":
            return DiskTransport(servers, config.run_folder / "weights", Path(config.model.hf_path))
        case "delta":
            return DeltaTransport(servers, config.weight_sync.bucket_megabytes * 2**20)
    return BroadcastTransport(servers)
