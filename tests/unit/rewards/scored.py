"""Samples as reward functions get them."""

from typing import Any

import numpy as np

from megatron_vespo.types import Prompt, Sample


def make(text: str, label: str = "", tokens: int = 1, finish: str = "stop", **metadata: Any) -> Sample:
    """A response with this text and so many tokens."""
    prompt = Prompt(0, np.array([1, 2], np.int32), label, metadata)
    ids = np.ones(tokens, np.int32)
    return Sample(prompt, 0, ids, np.zeros(tokens, np.float32), ids, finish, text)
