"""Device, backend and seeds: what differs between a laptop and a GPU node, and nothing else."""

from __future__ import annotations

import torch

from megatron_vespo.platform import cpu


def prepare() -> None:
    """Make this process ready to import ``megatron.core``. Nothing is changed on a machine with CUDA."""
    if torch.cuda.is_available():
        return
    cpu.install()


def device() -> torch.device:
    """Device of this rank's tensors; on GPUs the one chosen with ``torch.cuda.set_device``."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def backend() -> str:
    """Collective backend of that device."""
    return "nccl" if torch.cuda.is_available() else "gloo"
