"""Transformer Engine's modules without a GPU: they can be built, loaded and saved on the CPU, but not run."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from megatron_vespo.platform.cpu import _copy_namespace

INSTALLED = importlib.util.find_spec("transformer_engine") is not None


def build_without_gpu(capability: tuple[int, int] = (9, 0)) -> None:
    """Let modules be made in this process, which should end afterwards, as if on a device of that compute capability.

    Transformer Engine refuses to make them where ``torch.cuda.is_available()`` is false (pytorch/module/base.py), and
    its Adam makes a buffer on the GPU. Everything else is the real thing.
    """
    for name in ("pytorch.module.base", "pytorch.quantization"):
        module = importlib.import_module(f"transformer_engine.{name}")
        cuda = _copy_namespace(torch.cuda, {"is_available": lambda: True})
        module.__dict__["torch"] = _copy_namespace(torch, {"cuda": cuda})
    quantization = importlib.import_module("transformer_engine.pytorch.quantization")
    quantization.__dict__["get_device_compute_capability"] = lambda: capability
    for name in ("_FP8_SUPPORT", "_MXFP8_SUPPORT", "_FP8_BLOCK_SCALING_SUPPORT"):
        quantization.__dict__[name] = None
    from megatron.core import optimizer

    optimizer.USING_PYTORCH_OPTIMIZER = True  # read by platform.megatron.use_adam
