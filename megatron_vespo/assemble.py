"""From configuration to objects: the only wiring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo import parallel
from megatron_vespo.algorithms.advantages import GroupNormalizedParams, get_advantage_estimator
from megatron_vespo.algorithms.loss import Aggregation
from megatron_vespo.algorithms.weights import get_kernel
from megatron_vespo.config import Config
from megatron_vespo.data.prompts import PromptDataset, PromptStream
from megatron_vespo.data.sft import SupervisedExample, SupervisedStream, read_supervised
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.evaluation import Evaluator
from megatron_vespo.loop import Algorithm, Schedule
from megatron_vespo.metrics.console import RL_COLUMNS, SFT_COLUMNS, Console
from megatron_vespo.metrics.sinks import JsonlSink, MetricSink, RolloutSink, TensorBoardSink
from megatron_vespo.models.build import build_model, ddp_config, optimizer_config, transformer_config
from megatron_vespo.models.conversion import HfExporter, load_hf_weights
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.policy.checkpoint import save_hf
from megatron_vespo.policy.policy import Policy
from megatron_vespo.record import Recorder
from megatron_vespo.rewards.loader import load_reward
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.engine import RolloutEngine
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.rollout.service import RolloutService
from megatron_vespo.types import Prompt, Sample
from megatron_vespo.weight_sync.broadcast import BroadcastTransport
from megatron_vespo.weight_sync.disk import DiskTransport
from megatron_vespo.weight_sync.sync import Transport, WeightSync


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
    gpt = build_model(
        architecture,
        transformer_config(architecture, section, model.layer_spec),
        layer_spec=model.layer_spec,
        make_vocab_size_divisible_by=model.make_vocab_size_divisible_by,
    )
    if model.initialize == "hf":
        load_hf_weights(gpt, architecture, HfReader(model.hf_path))
    updates = config.training.steps * (config.training.minibatches_per_step if config.objective == "rl" else 1)
    policy = Policy(
        gpt,
        ddp_config=ddp_config(section),
        optimizer_config=optimizer,
        total_steps=updates,
        warmup_steps=config.training.lr_warmup_steps,
        decay_style=config.training.lr_decay_style,
        vocab_size=architecture.vocab_size,
        temperature=config.rollout.temperature if config.objective == "rl" else 1.0,
        alignment=_alignment(section),
    )
    exporter = HfExporter(gpt, architecture, config.weight_sync.bucket_megabytes * 2**20)

    def save(step: int) -> None:
        save_hf(exporter, config.run_folder / "checkpoints" / f"step_{step:06d}", Path(model.hf_path))

    return Trainer(policy, exporter, save)


def _alignment(section: dict[str, Any]) -> int:
    """Packed microbatches are padded to this: sequence parallelism splits them, FP8 wants multiples of 16."""
    split = parallel.tensor_parallel_size() if section.get("sequence_parallel") else 1
    return split * (16 if section.get("fp8") else 1)


def make_schedule(config: Config) -> Schedule:
    """How long, and in what pieces."""
    training = config.training
    return Schedule(
        training.steps,
        training.minibatches_per_step,
        training.max_tokens_per_microbatch,
        config.checkpoint.interval,
    )


def make_algorithm(config: Config) -> Algorithm:
    """Advantages, kernel and aggregation."""
    algorithm = config.algorithm
    kernel = get_kernel(algorithm.kernel)
    try:
        params = kernel.params_type(**algorithm.kernel_params)
    except TypeError as error:
        raise UserError(f"algorithm.kernel_params: {error}") from error
    estimator = get_advantage_estimator(algorithm.advantage)
    return Algorithm(
        partial(estimator, params=GroupNormalizedParams(normalize_std=algorithm.normalize_std)),
        kernel,
        params,
        Aggregation(algorithm.aggregation),
        recompute_log_mu=config.rollout.behavior_logprobs == "recompute",
    )


def make_recorder(config: Config, tokenizer: Tokenizer, facts: dict[str, str]) -> Recorder:
    """Console, sinks and summary on rank 0; a recorder that only keeps time elsewhere."""
    steps, folder = config.training.steps, config.run_folder
    if not parallel.is_main():
        return Recorder(steps, None, (), None, folder, facts)
    sinks: list[MetricSink] = [JsonlSink(folder / "metrics.jsonl")]
    if config.logging.tensorboard:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    if config.objective == "sft":
        console, rollout_sink = Console(steps, SFT_COLUMNS), None
    else:
        console = Console(steps, RL_COLUMNS)
        rollout_sink = RolloutSink(
            folder / "rollouts", config.logging.rollout_groups, lambda ids: tokenizer.decode(ids.tolist())
        )
    return Recorder(steps, console, sinks, rollout_sink, folder, facts, config.logging.console_interval)


@dataclass(frozen=True)
class Rollouts:
    """Generation, evaluation and weight pushes.

    Attributes:
        service: Rollout batches.
        evaluator: Held-out accuracy.
        weight_sync: Pushes.
    """

    service: RolloutService
    evaluator: Evaluator
    weight_sync: WeightSync


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
        server: The server that rank 0 started; None on other ranks, or where ``rollout.server.url`` names one.
        stack: Takes what must be closed at the end.
    """
    rollout = config.rollout
    sampling = SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        stop_token_ids=tuple(rollout.stop_token_ids),
    )
    engine, control, transport = None, None, None
    evaluation: dict[str, list[Prompt]] = {name: [] for name in config.data.evaluation}  # read on rank 0 alone

    def connect() -> None:
        nonlocal engine, control, transport, evaluation
        train, evaluation = _read_prompts(config, architecture, tokenizer)
        reward = load_reward(config.reward.function)
        if server is not None:
            server.wait_ready()
        url = server.url if server is not None else rollout.server.url
        assert url is not None
        control = SGLangControl(url, timeout=rollout.request_timeout)
        workers = control.info().tensor_parallel_size
        transport = _make_transport(config, control, workers)
        client = SGLangClient(
            url,
            vocab_size=architecture.vocab_size,
            max_concurrent=rollout.concurrency,
            timeout=rollout.request_timeout,
        )
        engine = RolloutEngine(
            [client],
            PromptStream(train, config.run.seed, config.data.shuffle),
            RolloutBuffer(rollout.prompts_per_step, rollout.max_staleness),
            samples_per_prompt=rollout.samples_per_prompt,
            sampling=sampling,
            decode=tokenizer.decode,
            reward=reward,
            check_servers=server.check_alive if server is not None else lambda: None,
        )

    parallel.on_main(connect)
    service = RolloutService(engine, parallel.broadcast_bytes, rollout.prompts_per_step)
    weight_sync = WeightSync(exporter, control, transport)
    stack.callback(weight_sync.close)
    stack.callback(service.close)
    evaluator = Evaluator(
        service,
        evaluation,
        SamplingParams(
            max_new_tokens=rollout.max_new_tokens,
            temperature=config.evaluation.temperature,
            stop_token_ids=tuple(rollout.stop_token_ids),
            evaluation=True,
        ),
        config.evaluation.samples_per_prompt,
        config.evaluation.interval,
    )
    return Rollouts(service, evaluator, weight_sync)


def _make_transport(config: Config, control: SGLangControl, workers: int) -> Transport:
    if config.weight_sync.transport == "disk":
        return DiskTransport(control, config.run_folder / "weights", Path(config.model.hf_path))
    return BroadcastTransport(control, workers)


def _read_prompts(
    config: Config, architecture: Architecture, tokenizer: Tokenizer
) -> tuple[PromptDataset, dict[str, list[Prompt]]]:
    room = architecture.context_length - config.rollout.max_new_tokens
    limit = min(config.rollout.max_prompt_tokens or room, room)
    if limit < 1:
        raise UserError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a prompt in the model's context"
            f" of {architecture.context_length} tokens"
        )
    assert config.data.train is not None
    train = PromptDataset.from_jsonl(config.data.train, tokenizer, limit)
    sets = {
        name: PromptDataset.from_jsonl(path, tokenizer, limit).prompts(config.evaluation.max_prompts)
        for name, path in config.data.evaluation.items()
    }
    return train, sets


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
