"""What an estimate cannot know: figures to replace by measured ones."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


def _assume(default: float, meaning: str) -> float:
    value: float = field(default=default, metadata={"meaning": meaning})
    return value


@dataclass(frozen=True)
class Assumptions:
    """Every figure that is assumed; ``tools/estimate.py`` takes each as an option."""

    prompt_tokens: float = _assume(200, "mean length of a prompt, in tokens")
    response_share: float = _assume(0.4, "mean length of a response, as a share of rollout.max_new_tokens")
    length_variation: float = _assume(0.7, "standard deviation of the response lengths over their mean")
    mfu: float = _assume(
        0.0, "share of the bf16 peak in training, recomputation counted; 0: .25 with experts, .4 dense"
    )
    lockstep: float = _assume(0.95, "share of the training time that is not waiting for the slowest data-parallel rank")
    imbalance: float = _assume(1.5, "tokens of the busiest expert-parallel rank over the mean")
    reserved_gib: float = _assume(5.0, "GiB a GPU for CUDA, NCCL, workspaces and fragmentation, of the trainer")
    leftover_gib: float = _assume(2.0, "GiB a GPU that the sleeping side keeps, with placement.mode: colocate")
    decode_bandwidth: float = _assume(0.6, "share of the memory bandwidth that decoding reaches")
    iteration_ms: float = _assume(6.0, "milliseconds of a decoding step beside reading memory: launches, collectives")
    prefill_mfu: float = _assume(0.4, "share of the bf16 peak that prefill reaches")
    sync_bandwidth: float = _assume(0.4, "share of link or network that a weight push reaches")
    changed_share: float = _assume(0.2, "share of the weights that weight_sync.transport: delta sends")
    host_bandwidth: float = _assume(0.5, "share of the link to the host that offloading reaches")

    def describe(self) -> list[str]:
        """A line each: option, value, meaning."""
        names = [f"--{item.name.replace('_', '-')} {getattr(self, item.name):g}" for item in fields(self)]
        width = max(map(len, names))
        return [f"{name:<{width}}  {item.metadata['meaning']}" for name, item in zip(names, fields(self), strict=True)]
