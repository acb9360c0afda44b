"""The GPUs of this node by number and name, without torch."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

# What CUDA takes as the end of CUDA_VISIBLE_DEVICES.
_END = "-1"


def gpu_count() -> int:
    """GPUs that this process may use: those of CUDA_VISIBLE_DEVICES where it is set, else all of the node."""
    named = _named()
    return _installed() if named is None else len(named)


def cuda_visible_devices(devices: Iterable[int]) -> str:
    """CUDA_VISIBLE_DEVICES for a process that shall have these of our GPUs, counted as CUDA counts them here."""
    named = _named() or []
    return ",".join(named[device] if device < len(named) else str(device) for device in devices)


def _named() -> list[str] | None:
    """Entries of CUDA_VISIBLE_DEVICES: numbers or UUIDs."""
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    names = [name.strip() for name in value.split(",") if name.strip()]
    return names[: names.index(_END)] if _END in names else names


def _installed() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a container may lack it
        return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
