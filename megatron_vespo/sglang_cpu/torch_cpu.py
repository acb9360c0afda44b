"""The platform class itself, apart from the plugin's entry point because it imports SGLang and torch."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


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

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Have the workers forked rather than spawned, which saves them all imports, half of the start-up.

        Spawning is for CUDA, whose state does not survive a fork; here the main process has one thread and no device.
        """
        HookRegistry.register("sglang.srt.entrypoints.engine._set_envs_and_config", _use_fork, HookType.AFTER)
        # managers/scheduler_components/weight_updater.py:379 synchronises the device module after giving up memory.
        HookRegistry.register("torch.get_device_module", _device_module, HookType.AFTER)
        # managers/scheduler.py:2034: sleep_on_idle does not hold for the loop of a paused scheduler.
        paused = "sglang.srt.managers.scheduler.Scheduler._record_scheduler_state_for_paused_engine"
        HookRegistry.register(paused, _sleep_while_paused, HookType.AFTER)
        if server_args.enable_deterministic_inference:
            from megatron_vespo.sglang_cpu import determinism  # the sampler's modules, which take a second to import

            determinism.register()
        if server_args.enable_return_routed_experts:
            register = "sglang.srt.mem_cache.pool_host.common._cuda_host_register"
            HookRegistry.register(register, _pin_nothing, HookType.REPLACE)
        HookRegistry.apply_hooks()


def _use_fork(result: Any, *args: Any, **kwargs: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)


def _sleep_while_paused(result: Any, scheduler: Any) -> None:
    """Until the next request, which alone can end a pause: the trainer needs the core."""
    scheduler.maybe_sleep_on_idle()


def _device_module(result: Any, device: Any = None) -> Any:
    """A torch built for CUDA names it as the default also where there is none."""
    return torch.cpu if device is None else result


def _pin_nothing(buffer: Any, registration_granularity_bytes: int | None = None) -> None:
    """SGLang pins the buffer of chosen experts (state_capturer/base.py:68) by CUDA, whatever the device."""
