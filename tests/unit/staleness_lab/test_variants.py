import math

import pytest
import torch

from examples.staleness_lab.variants import TemperedParams, centered, normalized, tempered, tempering
from megatron_vespo.algorithms.vespo import sample_phi
from megatron_vespo.algorithms.weights import Weighting, WeightKernel, whole_ratios

LOG_W = torch.tensor([0.0, -2.0, -5.0, 1.5, -9.0, 3.0], dtype=torch.float64)
SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 0.0], dtype=torch.float64)


def kappa(kernel: WeightKernel, log_w: torch.Tensor = LOG_W, **params: float) -> torch.Tensor:
    ratios = whole_ratios(log_w, torch.zeros_like(log_w), None, torch.arange(len(log_w)), SIGNS)
    return Weighting(kernel, kernel.make_params(params)).of_minibatch(ratios)


def test_tempering_reaches_the_mean_that_was_asked_for() -> None:
    heard = SIGNS != 0
    for wanted in (0.3, 0.5, 0.9):
        params = TemperedParams(min_phi=wanted)
        alpha = tempering(LOG_W[heard], SIGNS[heard], params)
        assert 0 < alpha < 1
        assert float(
            sample_phi(alpha * LOG_W[heard], alpha * LOG_W[heard], SIGNS[heard], params).mean()
        ) == pytest.approx(wanted, abs=1e-4)
        assert float(kappa(tempered, min_phi=wanted)[heard].mean()) == pytest.approx(wanted, abs=1e-4)
    assert tempering(LOG_W[:1], SIGNS[:1], TemperedParams()) == 1.0
    assert tempering(LOG_W[:0], SIGNS[:0], TemperedParams()) == 1.0


def test_near_the_policy_all_variants_are_vespo() -> None:
    near = LOG_W * 1e-9
    for kernel in (tempered, normalized, centered):
        torch.testing.assert_close(kappa(kernel, near), torch.ones_like(near), rtol=0, atol=1e-7)


def test_what_normalizing_and_centering_do() -> None:
    heard = SIGNS != 0
    assert float(kappa(normalized)[heard].mean()) == pytest.approx(1.0)
    assert float(kappa(normalized, LOG_W - 50).max()) < 1e-6, "of samples that nobody hears, none is made loud"
    assert float(kappa(centered)[1]) == pytest.approx(1.0), "the median sample"
    assert math.isfinite(float(kappa(centered, LOG_W - 500).max()))
