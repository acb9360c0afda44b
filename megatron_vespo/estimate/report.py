"""An estimate as text."""

from __future__ import annotations

from megatron_vespo.config import Config
from megatron_vespo.estimate.estimate import Estimate

_GIB = 2**30


def describe_estimate(config: Config, estimate: Estimate) -> str:
    """Parameters, memory, FLOPs, times, assumptions and verdict."""
    sections = [
        _parameters(estimate),
        _trainer(config, estimate),
        *([_server(estimate)] if estimate.server else []),
        _host(estimate),
        *([_step(config, estimate)] if estimate.durations else []),
        ["assumed (each is an option)", *(f"  {line}" for line in estimate.assumptions.describe())],
        [f"warning: {warning}" for warning in estimate.warnings],
        _verdict(estimate),
    ]
    return "\n".join("\n".join(section) for section in sections if section)


def _row(name: str, value: float, unit: str = "GiB", note: str = "") -> str:
    return f"  {name:<42} {value:>9,.1f} {unit}{'  ' + note if note else ''}".rstrip()


def _billions(number: float) -> str:
    return f"{number / 1e9:.2f} B"


def _parameters(estimate: Estimate) -> list[str]:
    count, rank = estimate.count, estimate.trainer.parameters
    return [
        f"parameters: {_billions(count.total)}, of which {_billions(estimate.active)} work on a token;"
        f" experts {_billions(count.experts)}, embeddings {_billions(count.embedding)}",
        f"  on the fullest rank {_billions(rank.total)}: experts {_billions(rank.experts)}, other layers"
        f" {_billions(rank.split + rank.whole)}, embeddings {_billions(rank.embedding)}",
    ]


def _trainer(config: Config, estimate: Estimate) -> list[str]:
    sizes, memory, cluster = estimate.sizes, estimate.trainer, estimate.cluster
    layout = f"TP{sizes.tensor} PP{sizes.pipeline}"
    layout += f" VPP{sizes.virtual}" if sizes.virtual > 1 else ""
    layout += f" DP{sizes.data}"
    if estimate.count.experts:
        layout += f", experts EP{sizes.expert} ETP{sizes.expert_tensor} DP{sizes.expert_data}"
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "weights in FP8": memory.quantised,
        "activations of microbatches in flight": memory.activations,
        "activations of the layer worked on": memory.working,
        "log-probability head": memory.head,
        "CUDA, NCCL, workspaces (assumed)": memory.reserved,
    }
    lines = [
        f"trainer: {sizes.ranks} ranks on {cluster.nodes} node(s), {layout}",
        f"  memory of a GPU of stage {memory.stage}, {config.training.max_tokens_per_microbatch:,} tokens a microbatch",
    ]
    lines += [_row(name, value / _GIB) for name, value in rows.items() if value]
    note = "the head and a layer in turn"
    return [*lines, _row("together", memory.total / _GIB, note=f"of {estimate.device.memory_gib:.1f}; {note}")]


def _server(estimate: Estimate) -> list[str]:
    server, lengths = estimate.server, estimate.lengths
    assert server is not None
    full = int(server.tokens // (lengths.longest + lengths.prompt))
    mean = int(server.tokens // lengths.total)
    shared = ", on the trainer's GPUs" if estimate.cluster.shared else ""
    return [
        f"servers: {estimate.cluster.servers} with {server.devices} GPU(s) each{shared}; memory of a GPU",
        _row("weights", server.weights / _GIB),
        _row("keys and values", max(server.room, 0) / _GIB, note=f"{server.token / 2**10:.1f} KiB a token"),
        _row("together", server.budget / _GIB, note=f"of {estimate.device.memory_gib:.1f}"),
        f"  a server holds {server.tokens:,} tokens: {full} sequences of full length at once, {mean} of mean length",
    ]


def _host(estimate: Estimate) -> list[str]:
    lines = ["host memory of rank 0's node, and disk"]
    return lines + [_row(name, value / _GIB) for name, value in {**estimate.host, **estimate.disk}.items()]


def _step(config: Config, estimate: Estimate) -> list[str]:
    times, lengths, work = estimate.durations, estimate.lengths, estimate.work
    assert times is not None
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    overlap = "the longer of generating and the rest" if config.rollout.max_staleness else "one after the other"
    swap = [_row("swap: trainer's memory to the host and back", times.swap, "s")] if times.swap else []
    return [
        f"a step: {samples:,} samples of {lengths.total:,.0f} tokens, {work.model:.2e} FLOPs of the model,"
        f" {work.executed:.2e} executed",
        _row(
            "generate",
            times.generate,
            "s",
            f"{times.batch:.0f} sequences a server, {times.iteration * 1e3:.1f} ms a token",
        ),
        _row("  of it at least, for the longest response", times.tail, "s"),
        _row(
            "train", times.train, "s", f"MFU {times.mfu:.2f}" + (f", bubble {times.bubble:.2f}" if times.bubble else "")
        ),
        _row("sync: weight push", times.sync, "s"),
        *swap,
        _row("step", times.step, "s", overlap),
        f"  {times.tokens_per_second:,.0f} tokens/s, {times.tokens_per_second / estimate.cluster.gpus:,.0f} a GPU",
    ]


def _verdict(estimate: Estimate) -> list[str]:
    problems = estimate.problems
    return [f"does not fit: {problem}" for problem in problems] or ["fits"]
