"""The digits reward, which hangs, crashes or raises on a few samples."""

from __future__ import annotations

import os

from megatron_vespo.rewards.loader import load_reward
from megatron_vespo.types import Sample

FAULTS = {"300/0": "hang", "450/3": "exit", "600/1": "raise", "750/5": "hang", "900/2": "exit"}
"""What happens by the sample's name; prompts beyond those of the evaluation, which count from 0 as well."""

_digits = load_reward("examples/digits_cpu/task.py:reward")


def reward(sample: Sample) -> float:
    """As the digits task, but for the faults."""
    match FAULTS.get(sample.name):
        case "hang":
            while True:
                pass
        case "exit":
            os._exit(3)
        case "raise":
            raise ValueError("this one cannot be scored")
    value = _digits(sample)
    assert isinstance(value, float)
    return value
