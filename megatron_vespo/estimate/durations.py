"""FLOPs of a step and how long its parts take, from data sheets and assumptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_vespo.config import Config
from megatron_vespo.estimate.activations import Recompute
from megatron_vespo.estimate.assumptions import Assumptions
from megatron_vespo.estimate.cluster import Cluster
from megatron_vespo.estimate.devices import Device
from megatron_vespo.estimate.parameters import Count
from megatron_vespo.estimate.server import ServerMemory
from megatron_vespo.plan.sizes import Facts, Parallelism, samples_per_minibatch


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a sample is like, in tokens.

    Attributes:
        prompt: Mean.
        response: Mean.
        longest: Longest response.
        square: Mean of the squared length of prompt and response together.
    """

    prompt: float
    response: float
    longest: int
    square: float

    @property
    def total(self) -> float:
        """Mean of prompt and response together."""
        return self.prompt + self.response


def sample_lengths(config: Config, assume: Assumptions) -> Lengths:
    """Assumed lengths."""
    longest = config.rollout.max_new_tokens
    prompt = min(assume.prompt_tokens, config.rollout.max_prompt_tokens or assume.prompt_tokens)
    response = assume.response_share * longest
    return Lengths(prompt, response, longest, (prompt + response) ** 2 + (assume.length_variation * response) ** 2)


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of a step.

    Attributes:
        model: Forward and backward pass of all samples.
        executed: With what is computed again and with further forward passes.
    """

    model: float
    executed: float


def step_work(config: Config, cost: Callable[[int], float], samples: int, lengths: Lengths) -> Work:
    """FLOPs of training on a step's samples.

    Args:
        config: Configuration.
        cost: FLOPs of a forward pass over one sample by its length, from ``models.cost``.
        samples: Of the step.
        lengths: Of the samples.
    """
    # cost is a n + b n^2
    square = (cost(2) - 2 * cost(1)) / 2
    forward = samples * ((cost(1) - square) * lengths.total + square * lengths.square)
    further = int(config.rollout.behavior_logprobs != "rollout") + int(config.algorithm.kl_coef > 0)
    again = int(Recompute.of(config.megatron).full)
    return Work(3 * forward, (3 + again + further) * forward)


@dataclass(frozen=True, slots=True)
class Durations:
    """Seconds of a step.

    Attributes:
        generate: Sampling.
        decode: Of it, with all servers full.
        tail: Time that the longest response alone takes.
        batch: Sequences that a server decodes at once, in the mean.
        iteration: One decoding step.
        train: Training.
        bubble: Time without work in the pipeline, over the time with work.
        sync: Weight push.
        swap: Moving the trainer's memory out and in again.
        step: All together; asynchronous parts overlap.
        tokens_per_second: Of prompts and responses, over the step.
        mfu: Of the model's FLOPs, over the training time.
    """

    generate: float
    decode: float
    tail: float
    batch: float
    iteration: float
    train: float
    bubble: float
    sync: float
    swap: float
    step: float
    tokens_per_second: float
    mfu: float


def generate_time(
    config: Config,
    facts: Facts,
    server: ServerMemory,
    servers: int,
    device: Device,
    assume: Assumptions,
    lengths: Lengths,
    active_flops: float,
) -> tuple[float, float, float, float, float]:
    """Seconds of decoding with full servers, of the longest response, of prefill; mean batch; seconds a decoding step.

    Decoding reads, for each token of all sequences of a batch, the weights once and the keys and values of each.
    """
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    each = samples / servers
    limit = min(config.sglang.get("max_running_requests") or each, config.rollout.concurrency / servers, each)
    # A sequence is read at half its length in the mean; long ones are read for longer.
    cached = lengths.prompt + lengths.square / max(lengths.total, 1) / 2
    batch = max(min(server.tokens / max(lengths.total, 1), limit), 1)
    bandwidth = device.memory_gb_per_s * 1e9 * assume.decode_bandwidth

    def iteration(sequences: float) -> float:
        wanted = 1.0
        if facts.experts:
            wanted = 1 - (1 - facts.transformer["moe_router_topk"] / facts.experts) ** sequences
        read = server.read - server.read_experts * (1 - wanted)
        read += sequences / server.replicas * cached * server.token
        return read / bandwidth + assume.iteration_ms / 1e3

    decode = each * lengths.response / batch * iteration(batch)
    tail = lengths.longest * iteration(1)
    prompts = config.rollout.prompts_per_step * lengths.prompt / servers  # a group's samples share the prompt
    prefill = prompts * active_flops / (server.devices * device.bf16_tflops * 1e12 * assume.prefill_mfu)
    return decode, tail, prefill, batch, iteration(batch)


def train_time(
    config: Config,
    facts: Facts,
    sizes: Parallelism,
    device: Device,
    assume: Assumptions,
    work: Work,
    lengths: Lengths,
) -> tuple[float, float]:
    """Seconds of training, and the pipeline's idle time over its busy time."""
    mfu = assume.mfu or (0.25 if facts.experts else 0.40)
    tokens = samples_per_minibatch(config) / sizes.data * lengths.total
    microbatches = max(tokens / config.training.max_tokens_per_microbatch / 0.9, 1)
    bubble = (sizes.pipeline - 1) / sizes.virtual / microbatches
    seconds = work.executed / (sizes.ranks * device.bf16_tflops * 1e12 * mfu * assume.lockstep)
    return seconds * (1 + bubble), bubble


def sync_time(config: Config, count: Count, cluster: Cluster, device: Device, assume: Assumptions) -> float:
    """Seconds of a push: gathered on rank 0, then sent on; each over the slowest link on the way."""
    share = assume.changed_share if config.weight_sync.transport == "delta" else 1.0
    away = cluster.nodes + cluster.server_nodes > 1
    speed = (device.network_gb_per_s if away else device.link_gb_per_s) * 1e9 * assume.sync_bandwidth
    return 2 * count.total * (1 + share) / speed


def swap_time(offloaded: float, device: Device, assume: Assumptions) -> float:
    """Seconds that a rank needs to move so many bytes to the host and back."""
    return 2 * offloaded / (device.host_gb_per_s * 1e9 * assume.host_bandwidth)
