"""From configuration to objects: the wiring of a training run. What needs no trainer is wired in ``connect``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo import connect, parallel
from megatron_vespo.algorithms.loss import Aggregation
from megatron_vespo.algorithms.weights import get_kernel
from megatron_vespo.config import Config
from megatron_vespo.connect import make_advantages
from megatron_vespo.data.sft import SupervisedExample, SupervisedStream, read_supervised
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.evaluation import NoEvaluation
from megatron_vespo.loop import Algorithm, Evaluation, RolloutSource, Schedule, WeightPush
from megatron_vespo.megatron_options import microbatch_multiple
from megatron_vespo.models.build import build_model, ddp_config, optimizer_config, transformer_config
from megatron_vespo.models.conversion import load_hf_weights
from megatron_vespo.models.cost import sample_cost
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.policy.checkpoint import save_hf
from megatron_vespo.policy.policy import Policy
from megatron_vespo.record import Recorder
from megatron_vespo.rollout.batches import list_batches
from megatron_vespo.rollout.replay import BatchReader, ReplayService
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.rollout.service import RolloutService
from megatron_vespo.sglang_weights import LOADER
from megatron_vespo.types import Prompt, Sample
from megatron_vespo.weight_sync.broadcast import BroadcastTransport
from megatron_vespo.weight_sync.delta import DeltaTransport
from megatron_vespo.weight_sync.disk import DiskTransport
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.sync import WeightSync
from megatron_vespo.weight_sync.transport import Transport


@dataclass(frozen=True)
class Trainer:
    """The policy with what saving and pushing it needs.

    Attributes:
        policy: Model and optimizer.
        exporter: Streams its weights under HF names.
        save: Writes a checkpoint after a step; a collective.
    """

    policy: Policy
    exporter: HfExporter
    save: Callable[[int], None]


def make_trainer(config: Config, architecture: Architecture) -> Trainer:
    """Build the model, load its weights, wrap it for training. A collective."""
    section, model = config.megatron, config.model
    optimizer = optimizer_config(section)
    chunks = build_model(
        architecture,
        transformer_config(architecture, section, model.layer_spec),
        layer_spec=model.layer_spec,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
    )
    if model.initialize == "hf":
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
        alignment=_alignment(section),
    )
    exporter = HfExporter(chunks, architecture, config.weight_sync.bucket_megabytes * 2**20)

    def save(step: int) -> None:
        save_hf(exporter, config.run_folder / "hf" / f"step_{step:06d}", Path(model.hf_path))

    return Trainer(policy, exporter, save)


def _alignment(section: dict[str, Any]) -> int:
    """Packed microbatches are padded to this: sequence parallelism splits them, FP8 wants multiples of 16."""
    split = parallel.tensor_parallel_size() if section.get("sequence_parallel") else 1
    return split * (16 if section.get("fp8") else 1)


def make_schedule(config: Config, architecture: Architecture) -> Schedule:
    """How long, and in what pieces."""
    training = config.training
    return Schedule(
        training.steps,
        training.minibatches_per_step,
        training.max_tokens_per_microbatch,
        microbatch_multiple(config.megatron),
        sample_cost(architecture),
        config.checkpoint.hf_interval,
    )


def make_algorithm(config: Config) -> Algorithm:
    """Advantages, kernel and aggregation."""
    algorithm = config.algorithm
    kernel = get_kernel(algorithm.kernel)
    try:
        params = kernel.params_type(**algorithm.kernel_params)
    except TypeError as error:
        raise UserError(f"algorithm.kernel_params: {error}") from error
    return Algorithm(
        make_advantages(config),
        kernel,
        params,
        Aggregation(algorithm.aggregation),
        recompute_log_mu=config.rollout.behavior_logprobs == "recompute",
    )


def make_recorder(config: Config, architecture: Architecture, tokenizer: Tokenizer, facts: dict[str, str]) -> Recorder:
    """Console, sinks and summary on rank 0; a recorder that only keeps time elsewhere."""
    if parallel.is_main():
        return connect.make_recorder(config, architecture, tokenizer, facts)
    return Recorder(config.training.steps, None, (), None, config.run_folder, facts)


@dataclass(frozen=True)
class Rollouts:
    """Where batches come from and weights go.

    Attributes:
        service: Rollout batches.
        evaluator: Held-out accuracy.
        weight_sync: Pushes.
    """

    service: RolloutSource
    evaluator: Evaluation
    weight_sync: WeightPush


def make_rollouts(
    config: Config,
    architecture: Architecture,
    tokenizer: Tokenizer,
    exporter: HfExporter,
    server: SGLangServer | None,
    stack: ExitStack,
) -> Rollouts:
    """Connect to SGLang. A collective.

    Args:
        config: Configuration.
        architecture: Limits of prompts and ids.
        tokenizer: Texts.
        exporter: Weights to push.
        server: The server that rank 0 started; None on other ranks, or where ``rollout.server.url`` names some.
        stack: Takes what must be closed at the end.
    """
    connection, engine, servers, transport = None, None, None, None

    def on_main() -> None:
        nonlocal connection, engine, servers, transport
        connection = connect.connect(config, architecture, tokenizer, server)
        engine = connection.engine
        _check_loader(config, connection)
        servers = Servers(connection.controls, [info.tensor_parallel_size for info in connection.infos])
        transport = _make_transport(config, servers)

    parallel.on_main(on_main)
    service = RolloutService(engine, parallel.broadcast_bytes, config.rollout.prompts_per_step)
    weight_sync = WeightSync(exporter, servers, transport, verify=config.weight_sync.verify != "none")
    stack.callback(weight_sync.close)
    stack.callback(service.close)
    return Rollouts(service, connect.make_evaluator(config, service, connection), weight_sync)


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


def _make_transport(config: Config, servers: Servers) -> Transport:
    match config.weight_sync.transport:
        case "disk":
            return DiskTransport(servers, config.run_folder / "weights", Path(config.model.hf_path))
        case "delta":
            return DeltaTransport(servers, config.weight_sync.bucket_megabytes * 2**20)
    return BroadcastTransport(servers)


def _check_loader(config: Config, connection: connect.Connection) -> None:
    """Servers that others started may lack what runs inside them."""
    if config.weight_sync.transport != "delta" and config.weight_sync.verify == "none":
        return
    for control, info in zip(connection.controls, connection.infos, strict=True):
        if LOADER not in info.weight_loaders:
            raise UserError(
                f"{control.base_url} was started without --custom-weight-loader {LOADER}, which weight_sync.verify and"
                " transport delta need: start it so, with megatron_vespo on its PYTHONPATH, or set weight_sync.verify:"
                " none and another transport"
            )


def make_sft_batches(config: Config, architecture: Architecture, tokenizer: Tokenizer) -> Iterator[list[Sample]]:
    """Minibatches of texts, the same on every rank."""
    assert config.data.train is not None
    examples = read_supervised(config.data.train, tokenizer, architecture.context_length)
    stream = SupervisedStream(examples, config.run.seed, config.data.shuffle)
    number = 0
    while True:
        batch = []
        for _ in range(config.training.samples_per_step):
            batch.append(_as_sample(next(stream), number))
            number += 1
        yield batch


def _as_sample(example: SupervisedExample, number: int) -> Sample:
    """A text as the policy sees it: the tokens to predict are the response."""
    first = int(example.loss_mask.argmax())
    response = example.input_ids[first:]
    return Sample(
        Prompt(number, example.input_ids[:first]),
        0,
        response,
        log_mu=np.zeros(len(response), dtype=np.float32),
        weight_versions=response * 0,
        finish_reason="stop",
    )
