"""Weights out of the trainer: Megatron's to Hugging Face's, in buckets, as a push has them, and rounded to FP8 blocks.

python -m benchmarks.gpu.export [--layers 4]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.gpu import models
from benchmarks.gpu.measure import Setting, milliseconds, peak_bytes
from benchmarks.gpu.report import Report
from benchmarks.gpu.script import run
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.fp8 import quantise_blocks

BLOCK = (128, 128)


def stream(exporter: HfExporter) -> None:
    """All buckets, put together."""
    for _ in exporter.stream():
        pass


def flatten(exporter: HfExporter) -> None:
    """All buckets, each as one flat tensor, as the servers get them."""
    for tensors in exporter.stream():
        torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in tensors])


def quantise(exporter: HfExporter) -> None:
    """All buckets, every matrix of the layers rounded to FP8 in blocks."""
    for tensors in exporter.stream():
        for name, tensor in tensors:
            if tensor.dim() == 2 and ".layers." in name and not name.endswith("mlp.gate.weight"):
                quantise_blocks(tensor, BLOCK)


def measure(setting: Setting, report: Report, layers: int = 4) -> None:
    """Fill the report."""
    facts = models.architecture(setting, 1 if setting.tiny else layers)
    _, chunks = models.model(setting, facts, models.fp8_section(None))
    for megabytes in (512, 2048):
        with report.attempt(f"buckets of {megabytes} MiB"):
            exporter = HfExporter(chunks, facts, megabytes * 2**20)
            size = sum(tensor.nbytes for bucket in exporter.stream() for _, tensor in bucket)
            ways = {
                "export": lambda exporter=exporter: stream(exporter),
                "export, flat": lambda exporter=exporter: flatten(exporter),
                "export, FP8 blocks": lambda exporter=exporter: quantise(exporter),
            }
            for name, milli in milliseconds(setting, ways).items():
                beside = peak_bytes(setting, ways[name]) / 2**20
                report.add(name, megabytes, size / 2**30, milli, size / milli / 1e6, beside)


def new_report(path: str | None = None) -> Report:
    """The empty table."""
    return Report(
        "Weights of 4 layers of Qwen3-30B-A3B, embedding and output layer, for a push",
        ("way", "bucket MiB", "GiB", "ms", "GB/s", "beside MiB"),
        "48 layers are 57 GiB. A layer is 1,160 small operations; where the host is slower with them than the device is"
        " with the copies, the host is what is seen.",
        path=path,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    return run(__doc__, arguments, new_report, measure, layers=4)


if __name__ == "__main__":
    raise SystemExit(main())
