"""The platform class itself, apart from the plugin's entry point because it imports SGLang and torch."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Plain PyTorch on CPU: no AMX kernels, no Triton, no graph capture."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def is_pin_memory_available(self, device: Any = None) -> bool:
        """There is no device to pin host memory for."""
        return False

    def get_default_attention_backend(self) -> str:
        """Scaled dot-product attention of PyTorch."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        """``forward_native`` of every fused operator."""
        return "native"
