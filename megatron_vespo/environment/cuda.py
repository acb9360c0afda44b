"""What can be seen once torch is imported, before Megatron is."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_vespo.errors import UserError
from megatron_vespo.gpus import read_gpus


def check_torch() -> None:
    """Check that torch can use the GPUs that the driver shows, before it quietly takes the CPU instead.

    Raises:
        UserError: It cannot, or has no NCCL.
    """
    gpus = read_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")).count
    if not gpus or torch.version.cuda is None:
        return
    if not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} cannot use the {gpus} GPUs that the driver shows: {_cuda_error()}; try"
            " `python -c 'import torch; torch.cuda.init()'`, and see docs/environment.md"
        )
    if not dist.is_nccl_available():
        raise UserError(f"torch {torch.__version__} has no NCCL, by which GPUs exchange data; install another build")


def _cuda_error() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return "torch gives no reason"
