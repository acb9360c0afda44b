"""Attention of one layer over packed samples against the same samples padded to their longest.

python -m benchmarks.gpu.attention [--tokens 16384]

Both ways run the model's own attention (cuDNN's through Transformer Engine on a GPU) on 32 heads of 128 with 4
key-value heads. "padded" is what a trainer without packing computes: every sample as long as the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.measure import Setting, milliseconds, peak_bytes
from benchmarks.gpu.report import Report
from benchmarks.gpu.samples import fed, with_tokens
from benchmarks.gpu.script import run
from megatron_vespo.policy.packing import PackedBatch, pack
from megatron_vespo.types import Sample


def packed(setting: Setting, samples: Sequence[Sample]) -> PackedBatch:
    """All samples in one row."""
    return pack(samples, range(len(samples)), trains=lambda sample: True, alignment=16, device=setting.device)


def padded(samples: Sequence[Sample]) -> list[Sample]:
    """Each as long as the longest, filled up in front."""
    longest = max(fed(samples))
    return [
        replace(
            sample,
            prompt=replace(sample.prompt, input_ids=np.pad(sample.prompt.input_ids, (longest - length, 0))),
        )
        for sample, length in zip(samples, fed(samples), strict=True)
    ]


def make_ways(
    setting: Setting, module: torch.nn.Module, batch: PackedBatch, heads: tuple[int, int, int]
) -> dict[str, Callable[[], object]]:
    """Forward pass, and forward and backward pass, over one row of samples."""
    queries, groups, size = heads
    tokens = len(batch.tokens)

    def random(number: int) -> Tensor:
        return torch.randn(tokens, number, size, device=setting.device, dtype=torch.bfloat16)

    inputs = [random(number).requires_grad_() for number in (queries, groups, groups)]
    wish = torch.randn(tokens, queries * size, device=setting.device, dtype=torch.bfloat16)

    def forward() -> Tensor:
        from megatron.core.transformer.enums import AttnMaskType

        return module(
            *inputs,
            attention_mask=None,
            attn_mask_type=AttnMaskType.causal,
            packed_seq_params=batch.packed_seq_params,
        ).view(tokens, -1)

    return {"forward": forward, "both": lambda: torch.autograd.grad(forward(), inputs, wish)}


def measure(setting: Setting, report: Report, tokens: int = 16384) -> None:
    """Fill the report."""
    torch.manual_seed(0)
    facts = models.architecture(setting, layers=1, vocab_size=640)
    config, (chunk,) = models.model(setting, facts, models.fp8_section(None))
    module = chunk.get_submodule("decoder.layers.0.self_attention.core_attention")
    heads = (config.num_attention_heads, config.num_query_groups, config.kv_channels)
    samples = with_tokens(128 if setting.tiny else tokens, 64 if setting.tiny else tokens // 2, 640)
    real = sum(fed(samples))
    flops = sum(2.0 * heads[0] * heads[2] * length**2 for length in fed(samples))
    layouts = {"packed": samples, "padded": padded(samples)}
    ways = {
        f"{layout} {name}": work
        for layout, rows in layouts.items()
        for name, work in make_ways(setting, module, packed(setting, rows), heads).items()
    }
    times = milliseconds(setting, ways)
    for layout, rows in layouts.items():
        forward, both = times[f"{layout} forward"], times[f"{layout} both"]
        report.add(
            *(layout, len(samples), real, sum(fed(rows)), forward, both - forward),
            3 * flops / both / 1e9,
            both / times["packed both"],
            peak_bytes(setting, partial(ways[f"{layout} both"])) / 2**20,
        )


def new_report(path: str | None = None) -> Report:
    """The empty table."""
    return Report(
        "Attention of one layer of Qwen3-30B-A3B over 16,384 packed tokens, and padded",
        (
            *("way", "samples", "tokens", "positions computed", "forward ms", "backward ms"),
            *("TFLOP/s of real tokens", "/ packed", "beside MiB"),
        ),
        path=path,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    return run(__doc__, arguments, new_report, measure, tokens=16384)


if __name__ == "__main__":
    raise SystemExit(main())
