"""GPUs that an estimate can be made for: what their data sheets say."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU in its usual node of eight.

    Attributes:
        memory_gib: Memory that CUDA reports, in GiB.
        bf16_tflops: Dense bfloat16 matrix products, in TFLOP/s.
        memory_gb_per_s: Bandwidth of its memory, in GB/s.
        link_gb_per_s: To the other GPUs of the node, one direction, in GB/s.
        network_gb_per_s: To other nodes: its share of the network adapters, one direction, in GB/s.
        host_gb_per_s: To host memory, one direction, in GB/s.
    """

    memory_gib: float
    bf16_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float
    network_gb_per_s: float
    host_gb_per_s: float


DEVICES: dict[str, Device] = {
    "a100": Device(79.3, 312, 2039, 300, 25, 32),
    "h100": Device(79.6, 989, 3350, 450, 50, 64),
    "h200": Device(139.8, 989, 4800, 450, 50, 64),
    "b200": Device(178.4, 2250, 7700, 900, 50, 64),
}
"""The SXM versions of 80 (A100, H100), 141 and 180 GB."""


def peak_tflops(name: str) -> float | None:
    """Dense bfloat16 peak (TFLOP/s) of a device as CUDA calls it, such as "NVIDIA H100 80GB HBM3".

    None where the table does not have it; its relatives on a PCIe card or with a Grace CPU have other peaks.
    """
    words = re.split(r"[^a-z0-9]+", name.lower())
    if "pcie" in words or "nvl" in words:
        return None
    return next((device.bf16_tflops for key, device in DEVICES.items() if key in words), None)
