"""SGLang platform plugin: every operation in plain PyTorch, so that unpatched SGLang serves on any CPU.

SGLang's own CPU platform needs AMX kernels; this one names the torch-native attention backend and the native
dispatch key instead. An installed plugin is discovered on GPU hosts too, hence the environment variable.
"""

from __future__ import annotations

import os

PLATFORM_NAME = "megatron_vespo_cpu"


def activate() -> str | None:
    """Entry point of group ``sglang.srt.platforms``: the platform's dotted path, or None where it was not asked for."""
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    return "megatron_vespo.sglang_cpu.torch_cpu.TorchCpuPlatform"
