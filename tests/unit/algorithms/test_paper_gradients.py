"""The gradient of every method is the one that autograd finds for the loss in its paper, see ``paper_losses``."""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from paper_losses import CORRECTIONS, PAPER_LOSSES, Group, corrected, grpo_without_dual_clip, m2po_mask, normalized
from torch import Tensor

from megatron_vespo.algorithms import importance
from megatron_vespo.algorithms.advantages import get_advantage_estimator
from megatron_vespo.algorithms.loss import Denominators, PackedLogProbs, policy_loss
from megatron_vespo.algorithms.methods import get_correction, get_kernel
from megatron_vespo.algorithms.weights import Weighting, whole_ratios
from megatron_vespo.types import Prompt, Sample, SampleGroup

MAX_LENGTH = 256
# Standard deviations of a token's log ratio, from inside GSPO's clip to outside every clip.
SCALES = [0.0, 1e-4, 0.02, 0.3, 1.5]


def kernel_gradient(
    group: Group, method: str, corrections: tuple[str, ...] = (), separate_old: bool = True, **overrides: float
) -> Tensor:
    """d loss / d log pi of the package's loss, 0 at padding, shape [G, L]: the one place that knows the package."""
    kernel, real = get_kernel(method), group.mask.bool()
    log_pi = group.log_pi.detach()[real].requires_grad_()
    inputs = PackedLogProbs(
        log_pi=log_pi,
        log_mu=group.log_mu[real],
        log_old=group.log_old[real] if separate_old else None,
        entropy=torch.zeros_like(log_pi),
        sample_index=real.nonzero()[:, 0],
        num_samples=group.size,
    )
    estimator = get_advantage_estimator(kernel.advantage)
    options = {"normalize_std": kernel.normalize_std, "eps": 0.0} if kernel.advantage == "group_normalized" else {}
    samples = sample_group(group.rewards.tolist())
    estimator([samples], estimator.params_type(**options))
    advantages = torch.tensor([sample.advantage for sample in samples.samples], dtype=torch.float64)
    factors = tuple((get_correction(name), get_correction(name).params_type()) for name in corrections)
    weighting = Weighting(kernel, kernel.params_type(**overrides), factors)
    if weighting.needs_minibatch:
        ratios = whole_ratios(inputs.log_pi.detach(), inputs.log_mu, inputs.log_old, inputs.sample_index, advantages)
        weighting = weighting.measured(ratios)
    denominators = Denominators(int(real.sum()), group.size, group.max_length)
    policy_loss(inputs, advantages, weighting, kernel.aggregation, denominators).loss.backward()
    assert log_pi.grad is not None
    return torch.zeros_like(group.mask).masked_scatter(real, log_pi.grad)


def sample_group(rewards: list[float]) -> SampleGroup:
    prompt = Prompt(0, np.array([1], np.int32))
    ids, floats = np.array([], np.int32), np.array([], np.float32)
    return SampleGroup(prompt, [Sample(prompt, i, ids, floats, ids, "stop", reward=r) for i, r in enumerate(rewards)])


def paper_gradient(group: Group, loss: Callable[[Group], Tensor]) -> Tensor:
    (gradient,) = torch.autograd.grad(loss(group), group.log_pi)
    return gradient


def log_ratios(lengths: list[int], rng: torch.Generator, scale: float | None) -> list[Tensor]:
    """A log ratio for each token: per answer one scale, drawn or given, and a sum that keeps W from 0 and inf."""
    ratios = []
    for length in lengths:
        spread = SCALES[int(torch.randint(len(SCALES), (), generator=rng))] if scale is None else scale
        tokens = spread * torch.randn(length, generator=rng, dtype=torch.float64)
        if length and spread:
            # 1e-3 a token is about GSPO's clip.
            widest = [1e-3 * length, 0.5, 3.0][int(torch.randint(3, (), generator=rng))] if spread > 1e-3 else 1e-3
            total = widest * torch.randn((), generator=rng, dtype=torch.float64)
            tokens += (total - tokens.sum()) / length
        ratios.append(tokens)
    return ratios


def make_group(
    lengths: list[int], rewards: list[float], seed: int = 0, drift: float | None = None, mismatch: float | None = None
) -> Group:
    rng = torch.Generator().manual_seed(seed)

    def pad(rows: list[Tensor], filler: float) -> Tensor:
        padded = torch.full((len(rows), max(lengths)), filler, dtype=torch.float64)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return padded

    log_pi = [-3 * torch.rand(n, generator=rng, dtype=torch.float64) for n in lengths]
    log_old = [pi - ratio for pi, ratio in zip(log_pi, log_ratios(lengths, rng, drift), strict=True)]
    log_mu = [old - ratio for old, ratio in zip(log_old, log_ratios(lengths, rng, mismatch), strict=True)]
    return Group(
        log_pi=pad(log_pi, -1.0).requires_grad_(),
        log_old=pad(log_old, -4.0),
        log_mu=pad(log_mu, -2.5),
        mask=pad([torch.ones(n, dtype=torch.float64) for n in lengths], 0.0),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        max_length=MAX_LENGTH,
    )


def random_group(seed: int) -> Group:
    """Ragged lengths from 0 to 200 and rewards that are right or wrong, or any number."""
    rng = torch.Generator().manual_seed(1000 + seed)
    size = 4 + int(torch.randint(5, (), generator=rng))
    lengths = [0, 1, 200, *torch.randint(1, 120, (size - 3,), generator=rng).tolist()]
    order = torch.randperm(size, generator=rng).tolist()
    values = torch.randn(size, generator=rng) if seed % 2 else torch.randperm(size, generator=rng) % 2
    return make_group([lengths[i] for i in order], values.tolist(), seed)


def spread_group() -> Group:
    """Every log ratio of pi to mu is at least 0.3 away from 0: M2PO has to mask every trust-region token."""
    group = make_group([5, 40, 3, 12], [1.0, 0.0, 0.0, 1.0], drift=0.0, mismatch=0.5)
    ratio = group.log_pi.detach() - group.log_mu
    log_mu = group.log_mu - torch.where(ratio >= 0, 0.3, -0.3)
    return dataclasses.replace(group, log_mu=log_mu, log_old=log_mu)


def group_about_the_cap() -> Group:
    """The whole answers' pi_old / mu is just below and just above 2, the cap of MIS."""
    group = make_group([5, 40, 3, 12], [1.0, 0.0, 0.0, 1.0], drift=0.1, mismatch=0.1)
    wanted = torch.tensor([1.95, 2.05, 1.95, 2.05], dtype=torch.float64).log()
    excess = (group.sum(group.log_old - group.log_mu) - wanted) / group.lengths
    return dataclasses.replace(group, log_mu=group.log_mu + excess[:, None])


def group_with_zero_advantages() -> Group:
    """Two answers have advantage 0 and r just above 1; they are many tokens, but none of M2PO's mean."""
    group = make_group([30, 9, 50, 70], [1.0, 0.0, 0.5, 0.5], drift=0.3, mismatch=0.3)
    log_mu = group.log_mu.clone()
    log_mu[2:] = group.log_pi.detach()[2:] - 0.01
    return dataclasses.replace(group, log_mu=log_mu, log_old=log_mu)


GROUPS = {f"random {seed}": random_group(seed) for seed in range(24)} | {
    "on-policy": make_group([7, 30, 1, 12], [1.0, 0.0, 0.25, 0.0], drift=0.0, mismatch=0.0),
    "near": make_group([20, 200, 5, 60], [1.0, 0.0, 0.0, 1.0], drift=1e-4, mismatch=1e-4),
    "far": make_group([20, 200, 5, 60], [1.0, 0.0, 0.0, 1.0], drift=1.5, mismatch=1.0),
    "advantages of 0": group_with_zero_advantages(),
    "nothing to trust": spread_group(),
    "about the cap": group_about_the_cap(),
    "equal rewards": make_group([4, 9, 0, 3], [0.1, 0.1, 0.1, 0.1], drift=0.3, mismatch=0.3),
    "one answer has tokens": make_group([0, 11, 0], [0.0, 1.0, 0.5], drift=0.3, mismatch=0.1),
}


def assert_same(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12, msg=lambda text: f"group {name!r}: {text}")


def with_mu_as_old(group: Group) -> Group:
    """The group where pi_old is not known apart from mu."""
    return dataclasses.replace(group, log_old=group.log_mu)


@pytest.fixture(params=[7, 8192], ids=["chunks of 7", "one chunk"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens come in chunks that begin and end within answers, or all at once."""
    monkeypatch.setattr(importance, "TOKENS_PER_CHUNK", request.param)


@pytest.mark.parametrize("method", PAPER_LOSSES)
def test_the_gradient_is_the_papers(method: str, chunks: None) -> None:
    for name, group in GROUPS.items():
        assert_same(kernel_gradient(group, method), paper_gradient(group, PAPER_LOSSES[method]), name)


@pytest.mark.parametrize("method", PAPER_LOSSES)
def test_without_pi_old_the_ratios_are_to_mu(method: str, chunks: None) -> None:
    for name, group in GROUPS.items():
        expected = paper_gradient(with_mu_as_old(group), PAPER_LOSSES[method])
        assert_same(kernel_gradient(group, method, separate_old=False), expected, name)


def test_grpo_without_dual_clip_is_its_papers(chunks: None) -> None:
    for name, group in GROUPS.items():
        expected = paper_gradient(group, grpo_without_dual_clip)
        assert_same(kernel_gradient(group, "grpo", dual_clip=float("inf")), expected, name)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("base", ["grpo", "reinforce"])
def test_a_correction_is_a_factor_on_each_token(base: str, correction: str, chunks: None) -> None:
    for name, group in GROUPS.items():
        expected = paper_gradient(group, lambda g: corrected(base, correction, g))
        assert_same(kernel_gradient(group, base, (correction,)), expected, name)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_without_pi_old_reinforce_is_corrected_by_pi_to_mu(correction: str, chunks: None) -> None:
    for name, group in GROUPS.items():
        now_old = dataclasses.replace(group, log_old=group.log_pi.detach())
        expected = paper_gradient(now_old, lambda g: corrected("reinforce", correction, g))
        assert_same(kernel_gradient(group, "reinforce", (correction,), separate_old=False), expected, name)


def test_no_two_methods_have_the_same_gradient() -> None:
    # So a kernel that has another method's clip or aggregation cannot pass.
    losses = PAPER_LOSSES | {"grpo without dual clip": grpo_without_dual_clip}
    gradients = {name: paper_gradient(GROUPS["random 1"], loss) for name, loss in losses.items()}
    for (one, first), (other, second) in itertools.combinations(gradients.items(), 2):
        assert (first - second).abs().max() > 1e-3 * first.abs().max(), (one, other)


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_the_groups_reach_both_sides_of_every_bound(sign: int) -> None:
    tokens, geometric, whole, mismatch, whole_mismatch = [], [], [], [], []
    for group in GROUPS.values():
        signed = normalized(group.rewards)[:, 0].sign() == sign
        real = group.mask.bool() & signed[:, None]
        drift, log_k = group.log_pi.detach() - group.log_old, group.log_old - group.log_mu
        tokens.append(drift[real].exp())
        mismatch.append(log_k[real].exp())
        present = signed & (group.mask.sum(1) > 0)
        geometric.append((group.sum(drift) / group.lengths)[present].exp())
        whole.append(group.sum(drift + log_k)[present].exp())
        whole_mismatch.append(group.sum(log_k)[present].exp())
    bounds = [
        (tokens, [0.8, 1.2, 1.28, 3, 5]),
        (geometric, [1 - 3e-4, 1 + 4e-4]),
        (whole, [0.5, 1, 2]),
        (mismatch, [0.5, 2, 5]),
        (whole_mismatch, [1, 2]),
    ]
    for values, edges in bounds:
        places = torch.bucketize(torch.cat(values), torch.tensor(edges, dtype=torch.float64))
        assert torch.bincount(places, minlength=len(edges) + 1).min() >= 3, (edges, torch.bincount(places))


def test_m2po_masks_no_some_and_all_trust_region_tokens() -> None:
    kept = {name: m2po_mask(group).sum() / group.mask.sum() for name, group in GROUPS.items()}
    assert kept["on-policy"] == kept["near"] == 1
    assert 0.5 < kept["far"] < 1
    group = GROUPS["nothing to trust"]
    log_ratio = group.log_pi.detach() - group.log_mu
    trusted = group.mask.bool() & (normalized(group.rewards) * log_ratio > 0)
    assert trusted.any() and not m2po_mask(group)[trusted].any()
