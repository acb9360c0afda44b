"""VESPO in plain Python, float64, from the paper's formula: what the torch code is compared with.

Written without a look at the package: loops, no vectors, no packing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CONSTANTS = {"pos": (2.0, 3.0), "neg": (3.0, 2.0)}


@dataclass
class ReferenceSample:
    log_pi: list[float]
    log_mu: list[float]
    advantage: float


def log_weight(sample: ReferenceSample) -> float:
    total = 0.0
    for pi, mu in zip(sample.log_pi, sample.log_mu, strict=True):
        if pi == -math.inf:
            return -math.inf
        total += pi - mu
    return total


def phi(log_w: float, advantage: float) -> float:
    c1, c2 = CONSTANTS["pos" if advantage >= 0 else "neg"]
    if math.isinf(log_w) or log_w > 600:
        return 0.0
    return math.exp(c1 * log_w + c2 * (1.0 - math.exp(log_w)))


def loss_and_gradients(samples: list[ReferenceSample], denominator: float) -> tuple[float, list[list[float]]]:
    """The loss, and d loss / d log pi of every token of every sample."""
    loss = 0.0
    gradients = []
    for sample in samples:
        log_w = log_weight(sample)
        weight = phi(log_w, sample.advantage) * sample.advantage / denominator
        if weight == 0.0:
            gradients.append([0.0] * len(sample.log_pi))
            continue
        for pi in sample.log_pi:
            loss -= weight * pi
        gradients.append([-weight] * len(sample.log_pi))
    return loss, gradients
