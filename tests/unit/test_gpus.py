"""What the driver's library is asked, with a stand-in for it that fills in what it is given."""

import ctypes
from typing import Any

import pytest

from megatron_vespo.gpus import Gpus, read_gpus

HANDLE = 0x7FFF_0000_1234


class Nvml:
    """As much of libnvidia-ml as is used; ``count`` GPUs."""

    def __init__(self, count: int, status: int = 0) -> None:
        self.count, self.status, self.open = count, status, 0

    def nvmlInit_v2(self) -> int:
        self.open += self.status == 0
        return self.status

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def nvmlSystemGetDriverVersion(self, buffer: Any, size: int) -> int:
        assert size == len(buffer) >= 80
        buffer.value = b"580.65.06"
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, version: Any) -> int:
        version._obj.value = 13010
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        assert index == 0
        handle._obj.value = HANDLE
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        assert handle.value == HANDLE
        major._obj.value, minor._obj.value = 9, 0
        return 0


@pytest.mark.parametrize(
    "library, visible, found",
    [
        (Nvml(8), None, Gpus(8, "580.65.06", (13, 1), (9, 0))),
        (Nvml(8), "0,1", Gpus(2, "580.65.06", (13, 1), (9, 0))),
        (Nvml(0), None, Gpus(0, "580.65.06", (13, 1), None)),
        (Nvml(8, status=9), None, Gpus()),
    ],
)
def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch, library: Nvml, visible: str | None, found: Gpus) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert read_gpus(visible) == found
    assert library.open == 0


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr("megatron_vespo.gpus.Path.glob", lambda self, pattern: iter(()))
    assert read_gpus(None) == Gpus()
