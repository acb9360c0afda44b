"""From the configuration to weights; what kernels do at the edges. Their gradients are in test_paper_gradients."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.algorithms.aggregation import Aggregation, Denominators
from megatron_vespo.algorithms.loss import PackedLogProbs, Regularization, policy_loss
from megatron_vespo.algorithms.methods import (
    CORRECTIONS,
    KERNELS,
    get_kernel,
    make_advantages,
    make_aggregation,
    make_weighting,
)
from megatron_vespo.algorithms.vespo import VespoParams
from megatron_vespo.algorithms.weights import Ratios, Weighting, whole_ratios
from megatron_vespo.config import AlgorithmSection
from megatron_vespo.errors import UserError
from megatron_vespo.types import Prompt, Sample, SampleGroup

# Other tests may have registered kernels of their own.
BUILT_IN = sorted(name for name, kernel in KERNELS.items() if kernel.function.__module__.startswith("megatron_vespo."))


def weighting(name: str, **params: float) -> Weighting:
    return Weighting(KERNELS[name], KERNELS[name].make_params(params))


def ratios(log_ratio: list[float], advantages: list[float], lengths: list[int] | None = None) -> Ratios:
    lengths = lengths or [1] * len(log_ratio)
    values = torch.tensor(log_ratio, dtype=torch.float64)
    index = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return whole_ratios(values, torch.zeros_like(values), None, index, torch.tensor(advantages, dtype=torch.float64))


def kappa(name: str, given: Ratios, **params: float) -> list[float]:
    return weighting(name, **params).of_minibatch(given).tolist()


@pytest.mark.parametrize("name", BUILT_IN)
def test_on_policy_every_method_is_reinforce(name: str) -> None:
    given = ratios([0.0] * 6, [1.0, -1.0, 0.5], [1, 2, 3])
    assert kappa(name, given) == [1.0] * 6


@pytest.mark.parametrize("name", sorted({*BUILT_IN} - {"vespo", "reinforce", "rloo"}))
@pytest.mark.parametrize("size", [-1000.0, 1000.0])
def test_no_weight_is_ever_infinite(name: str, size: float) -> None:
    for advantage in (1.0, -1.0):
        values = kappa(name, ratios([size, 0.0], [advantage, advantage]))
        assert all(math.isfinite(value) for value in values)


def test_clipping_by_the_sign_of_the_advantage() -> None:
    logs = [math.log(r) for r in (0.5, 0.79, 0.81, 1.19, 1.21, 2.9, 3.1)]
    assert kappa("grpo", ratios(logs, [1.0] * 7)) == pytest.approx([0.5, 0.79, 0.81, 1.19, 0, 0, 0])
    assert kappa("grpo", ratios(logs, [-1.0] * 7)) == pytest.approx([0, 0, 0.81, 1.19, 1.21, 2.9, 0])
    assert kappa("dapo", ratios(logs, [1.0] * 7))[4] == pytest.approx(1.21)
    assert kappa("dapo", ratios(logs, [-1.0] * 7))[6] == pytest.approx(3.1)


def test_gspo_clips_whole_responses_by_their_mean() -> None:
    given = ratios([2e-4, 4e-4, 6e-4, 6e-4], [1.0, 1.0], [2, 2])
    assert kappa("gspo", given) == pytest.approx([math.exp(3e-4)] * 2 + [0.0] * 2, rel=1e-12)


def test_m2po_silences_the_farthest_tokens_until_the_mean_square_is_below_tau() -> None:
    logs = [0.1, 0.2, 0.25, 0.9, -0.9, 0.0]
    assert kappa("m2po", ratios(logs, [1.0] * 6)) == pytest.approx([math.exp(x) if x != 0.9 else 0.0 for x in logs]), (
        "0.9 is too far; -0.9 moves against its advantage and is never clipped"
    )
    assert kappa("m2po", ratios(logs, [1.0] * 6), tau=1.0) == pytest.approx([math.exp(x) for x in logs])


def test_corrections_take_the_mismatch_where_it_is_known_and_the_whole_ratio_otherwise() -> None:
    log_mu, log_old, log_pi = (torch.tensor(x, dtype=torch.float64) for x in ([-1.0, -1.0], [-0.5, 0.2], [0.0, 0.0]))
    index, advantages = torch.zeros(2, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    params = {name: kernel.make_params({}) for name, kernel in CORRECTIONS.items()}

    def factor(name: str, old: torch.Tensor | None) -> list[float]:
        return CORRECTIONS[name](whole_ratios(log_pi, log_mu, old, index, advantages), params[name]).tolist()

    assert factor("tis", log_old) == pytest.approx([math.exp(0.5), 2.0])
    assert factor("tis", None) == [2.0, 2.0]
    assert factor("icepop", log_old) == pytest.approx([math.exp(0.5), math.exp(1.2)])
    assert factor("mis", log_old) == [0.0, 0.0]
    assert factor("mis", log_old - 0.8) == pytest.approx([math.exp(0.1)] * 2)


# --- the configuration ---


def test_the_configuration_lists_what_there_is() -> None:
    fields = AlgorithmSection.model_fields
    listed = {value for part in get_args(fields["aggregation"].annotation) for value in get_args(part)}
    assert listed == {item.value for item in Aggregation}
    help_text = str(fields["kernel"].description)
    assert all(f"{name}," in help_text for name in BUILT_IN)
    assert all(name in str(fields["corrections"].description) for name in CORRECTIONS)


def test_a_kernel_brings_its_papers_advantages_and_divisor() -> None:
    def advantages(**section: Any) -> list[float]:
        prompt, none, floats = Prompt(0, np.array([1], np.int32)), np.array([], np.int32), np.array([], np.float32)
        samples = [Sample(prompt, i, none, floats, none, "stop", reward=float(i == 0)) for i in range(4)]
        group = SampleGroup(prompt, samples)
        make_advantages(AlgorithmSection(**section))([group])
        return [sample.advantage for sample in group.samples]

    assert advantages() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert advantages(kernel="dr_grpo") == [0.75, -0.25, -0.25, -0.25]
    assert advantages(kernel="rloo") == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert advantages(kernel="dr_grpo", normalize_std=True) == advantages()
    assert advantages(kernel="grpo", advantage="leave_one_out") == advantages(kernel="rloo")
    assert make_aggregation(AlgorithmSection(kernel="grpo")) is Aggregation.SEQ_MEAN_TOKEN_MEAN
    assert make_aggregation(AlgorithmSection(kernel="grpo", aggregation="token-mean")) is Aggregation.TOKEN_MEAN


def test_other_implementations_names_of_the_parameters() -> None:
    section = AlgorithmSection(kernel_params={"k_pos": 1.0, "lambda_pos": 1.5, "k_neg": 2.5, "lambda_neg": 0.5})
    assert make_weighting(section, knows_old=False).params == VespoParams(1.0, 1.5, 2.5, 0.5)


@pytest.mark.parametrize(
    "section, text",
    [
        ({"kernel": "ppo"}, "unknown kernel 'ppo'"),
        ({"kernel_params": {"c1_poz": 1.0}}, "vespo has no parameter 'c1_poz'; did you mean 'c1_pos'"),
        ({"kernel_params": {"c1_pos": 1.0, "k_pos": 2.0}}, "c1_pos is given twice"),
        ({"kernel": "reinforce", "kernel_params": {"x": 1.0}}, "there are: none"),
        ({"kernel": "grpo", "kernel_params": {"dual_clip": 0.5}}, "dual_clip must be above 1"),
        ({"kernel": "cispo", "kernel_params": {"eps_high": -1.0}}, "eps_high must be"),
        ({"kernel": "reinforce", "corrections": {"tix": {}}}, "unknown correction 'tix'"),
        ({"kernel": "grpo", "corrections": {"tis": {}}}, "behavior_logprobs: both"),
        ({"kernel": "megatron_vespo.types:Sample"}, "is a type; make it a WeightKernel"),
        ({"kernel": "nowhere/kernels.py:mine"}, "does not exist"),
    ],
)
def test_what_is_refused(section: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=r"algorithm\.") as caught:
        make_weighting(AlgorithmSection(**section), knows_old=False)
    assert text in str(caught.value)


def test_a_kernel_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from megatron_vespo.algorithms.weights import weight_kernel\n"
        "@dataclass(frozen=True)\n"
        "class Params:\n"
        "    power: float = 0.5\n"
        "@weight_kernel('test-root', Params, normalize_std=False)\n"
        "def root(ratios, params):\n"
        "    return (params.power * ratios.log_ratio.clamp(max=20)).exp()\n"
    )
    try:
        section = AlgorithmSection(kernel=f"{tmp_path}/mine.py:root", kernel_params={"power": 2.0})
        found = make_weighting(section, knows_old=False)
        assert found(ratios([math.log(3)], [1.0])).tolist() == pytest.approx([9.0])
        assert get_kernel(section.kernel) is found.kernel, "a second look does not register it twice"
    finally:
        del KERNELS["test-root"]


# --- KL and entropy ---


def inputs(log_pi: torch.Tensor, entropy: torch.Tensor, log_ref: torch.Tensor | None = None) -> PackedLogProbs:
    index = torch.tensor([0, 0, 1, 2, 2, 2])
    return PackedLogProbs(log_pi, log_pi.detach() - 0.1, entropy, index, 4, None, log_ref)


KL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "k3": lambda d: d.exp() - d - 1,
    "k2": lambda d: d.square() / 2,
}


@settings(deadline=None)
@given(st.integers(0, 1000), st.sampled_from(list(Aggregation)), st.sampled_from(["k2", "k3"]))
def test_the_regularized_loss_is_its_formula(seed: int, aggregation: Aggregation, estimator: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_pi, log_ref = (-torch.rand(6, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    log_pi.requires_grad_()
    entropy = torch.rand(6, generator=generator, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, 0.0, -0.5, 2.0], dtype=torch.float64)
    regularization = Regularization(0.3, estimator, 0.7)
    sizes = Denominators(6, 4, 5)
    output = policy_loss(
        inputs(log_pi, entropy, log_ref), advantages, weighting("reinforce"), aggregation, sizes, regularization
    )
    index = torch.tensor([0, 0, 1, 2, 2, 2])
    lengths = torch.tensor([2.0, 2, 1, 3, 3, 3], dtype=torch.float64)
    share = {
        "token-mean": 1 / torch.full((6,), 6.0).double(),
        "seq-mean-token-sum": 1 / torch.full((6,), 4.0).double(),
        "seq-mean-token-mean": 1 / (4 * lengths),
        "seq-mean-token-sum-norm": 1 / torch.full((6,), 20.0).double(),
    }[aggregation.value]
    terms = -advantages[index] * log_pi + 0.3 * KL[estimator](log_ref - log_pi) - 0.7 * entropy
    expected = (share * terms).sum()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.sample_loss.sum(), expected.detach())
    torch.testing.assert_close(
        torch.autograd.grad(output.loss, [log_pi, entropy]), torch.autograd.grad(expected, [log_pi, entropy])
    )


def test_a_kl_term_without_a_reference_is_refused() -> None:
    log_pi = torch.zeros(6, requires_grad=True)
    with pytest.raises(ValueError, match="log_ref"):
        policy_loss(
            inputs(log_pi, torch.zeros(6)),
            torch.ones(4),
            weighting("reinforce"),
            Aggregation.TOKEN_MEAN,
            Denominators(6, 4),
            Regularization(kl_coef=0.1),
        )
