"""The forecast of what is heard, against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megatron_vespo.algorithms.forecast import TokenDrift, forecast, measure_drift, observed_weight
from megatron_vespo.algorithms.methods import get_kernel
from megatron_vespo.algorithms.weights import whole_ratios


def kappa_of(name: str):
    kernel = get_kernel(name)
    return lambda ratios: kernel(ratios, kernel.params_type())


VESPO, REINFORCE = kappa_of("vespo"), kappa_of("reinforce")


def softmax_rollout(rng: np.random.Generator, samples: int, length: int, temperature: float) -> np.ndarray:
    """log pi - log mu of tokens, [samples, length], where mu is pi at another temperature; logits are random."""
    logits = rng.normal(0, 1.2, (samples, length, 32))
    log_pi = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    tempered = logits / temperature
    log_mu = tempered - np.logaddexp.reduce(tempered, axis=-1, keepdims=True)
    drawn = (log_mu + rng.gumbel(size=log_mu.shape)).argmax(-1)[..., None]
    return (np.take_along_axis(log_pi, drawn, -1) - np.take_along_axis(log_mu, drawn, -1))[..., 0]


@pytest.mark.parametrize("temperature, length", [(0.9, 64), (0.9, 256), (1.1, 256), (0.98, 512)])
def test_the_forecast_is_what_is_then_seen(temperature: float, length: int) -> None:
    """Measured on 32 short responses, predicted for long ones, compared with 800 of those."""
    rng = np.random.default_rng(1)
    small = softmax_rollout(rng, 32, 64, temperature).ravel()
    heard = forecast(measure_drift(small), small, length, VESPO)
    seen = softmax_rollout(rng, 800, length, temperature).sum(1)
    assert heard.log_w_mean == pytest.approx(seen.mean(), abs=0.15 * seen.std())
    assert heard.log_w_sd == pytest.approx(seen.std(), rel=0.1)
    assert heard.weight == pytest.approx(
        observed_weight(seen, np.full(len(seen), 1.0 * length), small, VESPO), abs=0.05
    )
    for sign, mean, ess in (
        (1.0, heard.weight_pos, heard.ess_weight_pos),
        (-1.0, heard.weight_neg, heard.ess_weight_neg),
    ):
        phi = phi_of(seen, sign)
        assert mean == pytest.approx(phi.mean(), abs=0.05)
        assert ess == pytest.approx(phi.mean() ** 2 / (phi**2).mean(), abs=0.08)


def phi_of(log_w: np.ndarray, sign: float) -> np.ndarray:
    sequences = torch.from_numpy(log_w)
    index, advantages = torch.arange(len(log_w)), torch.full_like(sequences, sign)
    return VESPO(whole_ratios(sequences, torch.zeros_like(sequences), None, index, advantages)).numpy()


@pytest.mark.parametrize("sd, pos, neg", [(1.0, 0.70, 0.50), (2.0, 0.34, 0.20), (3.0, 0.13, 0.07)])
def test_known_values_of_a_normal_log_w(sd: float, pos: float, neg: float) -> None:
    """Facts of the method: log W with mean -sd^2 / 2, as E[W] = 1 demands."""
    drift = TokenDrift(100, sd**2 / 200, sd**2 / 200, sd**2 / 200, sd**2 / 100)
    heard = forecast(drift, np.zeros(100), 100, VESPO)
    assert heard.log_w_mean == pytest.approx(-(sd**2) / 2) and heard.log_w_sd == pytest.approx(sd)
    assert heard.weight_pos == pytest.approx(pos, abs=0.012) and heard.weight_neg == pytest.approx(neg, abs=0.012)
    assert heard.ess_w == pytest.approx(math.exp(-(sd**2)))


def test_nothing_differs_and_everything_is_heard() -> None:
    heard = forecast(measure_drift(np.zeros(50)), np.zeros(50), 1000, VESPO)
    assert (heard.weight, heard.ess_w, heard.ess_weight_pos) == pytest.approx((1.0, 1.0, 1.0))


def test_the_integral_holds_far_out() -> None:
    """A standard deviation of log W of 50: 2 % of the responses lie where phi is not 0."""
    drift = TokenDrift(100, 0.0, 0.0, 0.0, 2500.0)
    heard = forecast(drift, np.zeros(100), 1, VESPO)
    fine = np.linspace(-60, 6, 2_000_001)
    density = np.exp(-((fine / 50) ** 2) / 2) / (50 * math.sqrt(2 * math.pi))
    for sign, mean in ((1.0, heard.weight_pos), (-1.0, heard.weight_neg)):
        exact = np.trapezoid(phi_of(fine, sign) * density, fine)
        assert mean == pytest.approx(exact, rel=1e-3)


def test_a_weight_that_is_always_one_says_nothing() -> None:
    rng = np.random.default_rng(0)
    ratios = rng.normal(0, 0.2, 500)
    heard = forecast(measure_drift(ratios), ratios, 1000, REINFORCE)
    assert heard.weight is None and heard.weight_pos is None and heard.ess_weight_neg is None
    assert heard.ess_w < 1e-10
    assert observed_weight(ratios, np.ones(len(ratios)), ratios, REINFORCE) is None


def test_the_drift_after_top_p_is_k1() -> None:
    """Log-probabilities that do not sum to 1 fool k3: pi of what was kept is smaller, every time."""
    kept = measure_drift(np.full(1000, math.log(0.93)) + np.random.default_rng(0).normal(0, 0.01, 1000))
    assert kept.k3 == pytest.approx(0.93 - 1 - math.log(0.93), abs=1e-3)
    assert kept.drift == kept.k1 == pytest.approx(-math.log(0.93), abs=1e-3)


def test_the_drift_of_a_distribution_is_k3() -> None:
    tokens = softmax_rollout(np.random.default_rng(3), 32, 64, 0.9).ravel()
    drift = measure_drift(tokens)
    assert drift.drift == drift.k3 != drift.k1
    assert drift.variance == pytest.approx(2 * drift.k3, rel=0.1)
