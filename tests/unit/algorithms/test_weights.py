import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.algorithms.baselines import NoParams
from megatron_vespo.algorithms.methods import KERNELS, get_kernel
from megatron_vespo.algorithms.vespo import VespoParams, largest_phi, vespo_phi
from megatron_vespo.algorithms.weights import Ratios, weight_kernel, whole_ratios
from megatron_vespo.errors import UserError

INF = math.inf


def ratios(log_w: list[float], advantages: list[float], dtype: torch.dtype = torch.float32) -> Ratios:
    """One token a sample."""
    values = torch.tensor(log_w, dtype=dtype)
    index = torch.arange(len(log_w))
    return whole_ratios(values, torch.zeros_like(values), None, index, torch.tensor(advantages, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c1, c2", [(2.0, 3.0), (3.0, 2.0), (0.5, 0.5), (1.0, 8.0)])
def test_phi_is_exact_at_its_fixed_points(dtype: torch.dtype, c1: float, c2: float) -> None:
    log_w = torch.tensor([0.0, -INF, INF, math.nan, -1000.0, 1000.0, -1e30, 1e30], dtype=dtype)
    phi = vespo_phi(log_w, c1, c2, 80.0)
    assert phi.dtype == dtype
    if c1 >= 1:
        assert phi.tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    else:
        assert phi[:4].tolist() == [1, 0, 0, 0]
        assert phi[4:].max().item() < 1e-200


@pytest.mark.parametrize("c1, c2", [(2.0, 3.0), (3.0, 2.0), (0.5, 0.5), (1.0, 8.0)])
def test_phi_stays_below_its_bound_and_reaches_it(c1: float, c2: float) -> None:
    bound = largest_phi(c1, c2)
    log_w = torch.cat([torch.linspace(-1000, 1000, 40_001), torch.linspace(-3, 3, 60_001)])
    phi = vespo_phi(log_w, c1, c2, 80.0)
    assert phi.max() <= bound * (1 + 1e-6)
    assert phi.max() == pytest.approx(bound, rel=1e-5)
    assert (phi >= 0).all()


def test_default_bounds_are_the_documented_ones() -> None:
    peaks = [vespo_phi(torch.tensor([math.log(c1 / c2)]), c1, c2, 80.0).item() for c1, c2 in ((2, 3), (3, 2))]
    assert peaks == pytest.approx([1.208, 1.242], abs=5e-4)


@given(st.floats(-1000, 1000), st.floats(0.1, 10), st.floats(0.1, 10))
def test_phi_equals_the_formula(log_w: float, c1: float, c2: float) -> None:
    expected = 0.0 if log_w > 600 else math.exp(c1 * log_w + c2 * (1 - math.exp(log_w)))
    # The formula's own 1 - e^x loses digits near W = 1: an absolute error of 1e-16, far below this tolerance.
    actual = vespo_phi(torch.tensor([log_w], dtype=torch.float64), c1, c2, 80.0).item()
    assert actual == pytest.approx(expected, rel=1e-11, abs=1e-300)


def test_the_limit_clamps_log_w_from_above_only() -> None:
    phi = vespo_phi(torch.tensor([0.5, 2.0, 700.0, -50.0]), 2.0, 3.0, 1.0)
    at_limit, below = (vespo_phi(torch.tensor([x]), 2.0, 3.0, 80.0).item() for x in (1.0, -50.0))
    assert phi[1].item() == phi[2].item() == pytest.approx(at_limit)
    assert phi[3].item() == below


def test_vespo_takes_the_sign_from_the_samples_advantage() -> None:
    kappa = KERNELS["vespo"](ratios([0.5, 0.5, 0.5], [1.0, -1.0, 0.0]), VespoParams())
    pos, neg = (vespo_phi(torch.tensor([0.5]), c1, c2, 80.0).item() for c1, c2 in ((2, 3), (3, 2)))
    assert kappa.tolist() == [pos, neg, pos]
    assert pos != neg


def test_a_floor_keeps_good_responses_heard() -> None:
    log_w, params = [-9.0, -1.0, 0.5, -1.0, -INF], VespoParams(log_w_floor_pos=0.0)
    kappa = KERNELS["vespo"](ratios(log_w, [1.0, 1.0, 1.0, -1.0, 1.0]), params).tolist()
    plain = KERNELS["vespo"](ratios(log_w, [1.0, 1.0, 1.0, -1.0, 1.0]), VespoParams()).tolist()
    assert kappa == [1.0, 1.0, plain[2], plain[3], 0.0]
    # Of the drift alone: log pi_old/mu = -2 stays.
    log_pi, log_mu, index = torch.tensor([-4.0, 1.0]), torch.tensor([2.0, 0.0]), torch.arange(2)
    both = whole_ratios(log_pi, log_mu, torch.tensor([0.0, -2.0]), index, torch.ones(2))
    expected = vespo_phi(torch.tensor([-2.0, 1.0]), 2, 3, 80)
    torch.testing.assert_close(KERNELS["vespo"](both, params), expected)
    for value in (0.1, math.nan):
        with pytest.raises(UserError, match="log_w_floor_pos"):
            VespoParams(log_w_floor_pos=value)


def test_vespo_gives_every_token_its_samples_weight() -> None:
    log_ratio, index = torch.tensor([-0.1, 0.4, -0.2, 0.1, -0.1]), torch.tensor([1, 0, 1, 1, 0])
    given = whole_ratios(log_ratio, torch.zeros(5), None, index, torch.tensor([1.0, -1.0]))
    kappa = KERNELS["vespo"](given, VespoParams())
    a, b = vespo_phi(given.log_w[:1], 2, 3, 80).item(), vespo_phi(given.log_w[1:], 3, 2, 80).item()
    assert kappa.tolist() == [b, a, b, b, a]


def test_reinforce_is_one() -> None:
    assert KERNELS["reinforce"](ratios([5.0, -INF], [1.0, -1.0]), NoParams()).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["c1_pos", "c2_pos", "c1_neg", "c2_neg", "log_w_limit"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, INF])
def test_vespo_params_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        VespoParams(**{name: value})


def test_the_limit_may_not_overflow_float32() -> None:
    with pytest.raises(UserError, match="log_w_limit"):
        VespoParams(log_w_limit=89.0)
    assert torch.exp(torch.tensor(VespoParams(log_w_limit=88.0).log_w_limit)).isfinite()


def test_registry() -> None:
    assert get_kernel("vespo") is KERNELS["vespo"]
    assert get_kernel("vespo").params_type is VespoParams
    with pytest.raises(UserError, match="grpo, gspo, m2po, reinforce, rloo, sapo, topr, vespo"):
        get_kernel("ppo2")
    with pytest.raises(ValueError, match="twice"):
        weight_kernel("vespo", VespoParams)(lambda ratios, params: ratios.log_ratio)
