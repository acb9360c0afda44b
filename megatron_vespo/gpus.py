"""The GPUs of this machine, asked of the driver's management library. No torch, and no CUDA context is made."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_LIBRARY = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Gpus:
    """GPUs and their driver.

    Attributes:
        count: GPUs that processes of this environment see (CUDA_VISIBLE_DEVICES).
        driver: Version of the driver; None where there is none, or it cannot be asked.
        cuda: Newest CUDA version that the driver runs: (13, 0).
        capability: Compute capability of the first GPU: (9, 0).
    """

    count: int = 0
    driver: str | None = None
    cuda: tuple[int, int] | None = None
    capability: tuple[int, int] | None = None


def read_gpus(visible: str | None) -> Gpus:
    """Ask the driver.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        # A container without the driver's `utility` part has the devices all the same.
        return Gpus(visible_gpus(len(list(Path("/dev").glob("nvidia[0-9]*"))), visible))
    if library.nvmlInit_v2() != 0:
        return Gpus()
    try:
        return _ask(library, visible)
    finally:
        library.nvmlShutdown()


def _ask(library: ctypes.CDLL, visible: str | None) -> Gpus:
    count, cuda, driver = ctypes.c_uint(), ctypes.c_int(), ctypes.create_string_buffer(96)
    library.nvmlDeviceGetCount_v2(ctypes.byref(count))
    library.nvmlSystemGetDriverVersion(driver, len(driver))
    library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
    first, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if count.value:
        library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(first))
        library.nvmlDeviceGetCudaComputeCapability(first, ctypes.byref(major), ctypes.byref(minor))
    return Gpus(
        visible_gpus(count.value, visible),
        driver.value.decode() or None,
        (cuda.value // 1000, cuda.value % 1000 // 10) if cuda.value else None,
        (major.value, minor.value) if major.value else None,
    )


def visible_gpus(total: int, visible: str | None) -> int:
    """How many of ``total`` GPUs CUDA_VISIBLE_DEVICES leaves; as in CUDA, the first bad index ends the list."""
    if visible is None:
        return total
    count = 0
    for name in (part.strip() for part in visible.split(",")):
        if name.lstrip("-").isdigit():
            if not 0 <= int(name) < total:
                break
        elif not name.startswith(("GPU-", "MIG-")):
            break
        count += 1
    return count


def cuda_visible_devices(devices: Iterable[int]) -> str:
    """CUDA_VISIBLE_DEVICES for a process that shall have these of our GPUs, counted as CUDA counts them here."""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return ",".join(names[device] if device < len(names) else str(device) for device in devices)


def expandable_segments(environment: Mapping[str, str]) -> str | None:
    """The setting, ``NAME=value``, that has torch put GPU memory into expandable segments, which cannot be shared."""
    for name in _ALLOCATOR_VARIABLES:
        value = environment.get(name, "")
        if "expandable_segments:true" in value.replace(" ", "").lower():
            return f"{name}={value}"
    return None
