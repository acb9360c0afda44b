"""Random streams of this rank: Python's, numpy's, torch's and Megatron's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_vespo import parallel


def random_state() -> dict[str, Any]:
    """State of all streams, in types that ``torch.load(weights_only=True)`` knows."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on with all streams where they stood."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])


def reseed(seed: int, iteration: int) -> None:
    """New streams that follow from the run's seed and the iteration."""
    value = int(np.random.SeedSequence([seed, iteration]).generate_state(1)[0] >> 1)
    random.seed(value)
    np.random.seed(value)
    parallel.seed_random(value)
