import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vespo_reference import ReferenceSample, log_weight, loss_and_gradients, phi

from megatron_vespo.algorithms.loss import (
    Aggregation,
    Denominators,
    NonFiniteLogProbError,
    PackedLogProbs,
    PolicyLossOutput,
    policy_loss,
)
from megatron_vespo.algorithms.weights import KERNELS, ReinforceParams, VespoParams, weight_kernel
from megatron_vespo.errors import UserError

INF, NAN = math.inf, math.nan
GARBAGE = (NAN, INF, -INF, 1e30, 0.0)


class Packed:
    """Samples laid out in one row in any order, tokens of different samples mixed, garbage in the padding."""

    def __init__(self, samples: list[ReferenceSample], rng: random.Random, dtype: torch.dtype) -> None:
        tokens = [(s, t) for s, sample in enumerate(samples) for t in range(len(sample.log_pi))]
        self.positions: list[tuple[int, int] | None] = tokens + [None] * rng.randint(0, 9)
        rng.shuffle(self.positions)
        pi, mu, index = [], [], []
        for position in self.positions:
            if position is None:
                pi.append(rng.choice(GARBAGE))
                mu.append(rng.choice(GARBAGE))
                index.append(rng.choice((-1, 0, len(samples) - 1, 10_000)))
            else:
                s, t = position
                pi.append(samples[s].log_pi[t])
                mu.append(samples[s].log_mu[t])
                index.append(s)
        self.log_pi = torch.tensor(pi, dtype=dtype, requires_grad=True)
        self.inputs = PackedLogProbs(
            self.log_pi,
            torch.tensor(mu, dtype=dtype),
            torch.tensor(index, dtype=torch.int64),
            torch.tensor([p is not None for p in self.positions], dtype=torch.bool),
            len(samples),
        )
        self.advantages = torch.tensor([s.advantage for s in samples], dtype=dtype)

    def loss(self, aggregation: Aggregation, denominators: Denominators, name: str = "vespo") -> PolicyLossOutput:
        params = VespoParams() if name == "vespo" else ReinforceParams()
        return policy_loss(self.inputs, self.advantages, KERNELS[name], params, aggregation, denominators)

    def gradients(self, output: PolicyLossOutput) -> dict[tuple[int, int] | None, list[float]]:
        (gradient,) = torch.autograd.grad(output.loss, self.log_pi)
        result: dict[tuple[int, int] | None, list[float]] = {None: []}
        for position, value in zip(self.positions, gradient.tolist(), strict=True):
            result.setdefault(position, []).append(value)
        return result


def sizes(samples: list[ReferenceSample]) -> Denominators:
    return Denominators(max(1, sum(len(s.log_pi) for s in samples)), len(samples))


def denominator(aggregation: Aggregation, of: Denominators) -> int:
    return {"token-mean": of.tokens, "seq-mean-token-sum": of.samples}[aggregation.value]


def as_float32(samples: list[ReferenceSample]) -> list[ReferenceSample]:
    """The values a float32 tensor really holds, so that only the computation is compared."""

    def rounded(values: list[float]) -> list[float]:
        return torch.tensor(values, dtype=torch.float32).tolist()

    return [ReferenceSample(rounded(s.log_pi), rounded(s.log_mu), rounded([s.advantage])[0]) for s in samples]


def compare(samples: list[ReferenceSample], seed: int, aggregation: Aggregation, dtype: torch.dtype) -> None:
    rel, tiny = (1e-10, 1e-300) if dtype is torch.float64 else (2e-5, 1e-37)
    packed = Packed(samples, random.Random(seed), dtype)
    output = packed.loss(aggregation, sizes(samples))
    expected_loss, expected = loss_and_gradients(samples, denominator(aggregation, sizes(samples)))
    # Terms of both signs cancel, so the tolerance is relative to their absolute sum.
    terms = [
        g * sample.log_pi[t] for g_s, sample in zip(expected, samples, strict=True) for t, g in enumerate(g_s) if g
    ]
    assert output.loss.item() == pytest.approx(expected_loss, rel=rel, abs=rel * sum(map(abs, terms)) + tiny)
    actual = packed.gradients(output)
    assert all(value == 0 for value in actual[None])
    for s, (gradients, sample) in enumerate(zip(expected, samples, strict=True)):
        exactly_zero = sample.advantage == 0 or abs(log_weight(sample)) > 600
        for t, gradient in enumerate(gradients):
            assert actual[s, t] == [0.0 if exactly_zero else pytest.approx(gradient, rel=rel, abs=tiny)]


def moderate_samples() -> st.SearchStrategy[list[ReferenceSample]]:
    return samples_of(st.floats(-3, 3))


def samples_of(ratio: st.SearchStrategy[float]) -> st.SearchStrategy[list[ReferenceSample]]:
    token = st.tuples(st.floats(-30, 0), ratio)
    sample = st.tuples(st.lists(token, max_size=6), st.one_of(st.just(0.0), st.floats(-3, 3, width=32)))

    def build(item: tuple[list[tuple[float, float]], float]) -> ReferenceSample:
        tokens, advantage = item
        return ReferenceSample([pi for pi, _ in tokens], [pi - ratio for pi, ratio in tokens], advantage)

    return st.lists(sample.map(build), min_size=1, max_size=6)


AGGREGATIONS = st.sampled_from(list(Aggregation))


@settings(max_examples=300, deadline=None)
@given(samples_of(st.one_of(st.floats(-1000, 1000), st.floats(-1, 1))), st.integers(0, 10**6), AGGREGATIONS)
def test_float64_equals_the_reference(samples: list[ReferenceSample], seed: int, aggregation: Aggregation) -> None:
    compare(samples, seed, aggregation, torch.float64)


@settings(max_examples=300, deadline=None)
@given(moderate_samples(), st.integers(0, 10**6), AGGREGATIONS)
def test_float32_equals_the_reference(samples: list[ReferenceSample], seed: int, aggregation: Aggregation) -> None:
    compare(as_float32(samples), seed, aggregation, torch.float32)


@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_with_every_edge_case(aggregation: Aggregation, dtype: torch.dtype) -> None:
    samples = [
        ReferenceSample([-1.0, -2.0, -0.5], [-1.5, -1.0, -0.75], 1.5),
        ReferenceSample([-1.0, -2.0], [-1.25, -2.5], -0.5),
        ReferenceSample([-3.0, -4.0], [-1.0, -1.0], 0.0),
        ReferenceSample([], [], 1.0),
        ReferenceSample([-1000.0, -1.0], [-0.0, -1.0], 1.0),
        ReferenceSample([-1.0], [-1001.0], -1.0),
        ReferenceSample([-1.0, -INF], [-1.0, -2.0], 1.0),
        ReferenceSample([-1.0, -2.0], [-INF, -2.0], -1.0),
        ReferenceSample([-INF, -2.0], [-INF, -2.0], 1.0),
        ReferenceSample([-INF, -2.0], [-1.0, -INF], 1.0),
        ReferenceSample([-0.25], [-0.25], -2.0),
    ]
    for seed in range(20):
        compare(samples, seed, aggregation, dtype)
    output = Packed(samples, random.Random(0), dtype).loss(aggregation, sizes(samples))
    assert output.log_w.tolist() == [log_weight(s) for s in samples]
    assert output.log_w[3] == 0
    expected = [phi(log_weight(s), s.advantage) if s.log_pi else 0.0 for s in samples]
    assert output.kappa.tolist() == pytest.approx(expected, rel=1e-5)
    assert [k == 0 for k in output.kappa.tolist()] == [e == 0 for e in expected]
    assert output.n_tokens.tolist() == [len(s.log_pi) for s in samples]
    assert output.sum_log_pi[:4].tolist() == [-3.5, -3.0, -7.0, 0.0]
    assert output.sum_abs_log_ratio[:4].tolist() == [1.75, 0.75, 5.0, 0.0]
    assert output.max_abs_log_ratio[:4].tolist() == [1.0, 0.5, 3.0, 0.0]
    columns = (output.log_w, output.kappa, output.sum_log_pi, output.sum_abs_log_ratio, output.n_tokens)
    assert all(column.dtype == dtype and not column.requires_grad for column in columns)


@settings(max_examples=100, deadline=None)
@given(moderate_samples(), st.integers(0, 10**6), AGGREGATIONS, st.integers(1, 4))
def test_microbatches_sum_to_the_whole(
    samples: list[ReferenceSample], seed: int, aggregation: Aggregation, parts: int
) -> None:
    rng = random.Random(seed)
    whole = Packed(samples, rng, torch.float64)
    whole_output = whole.loss(aggregation, sizes(samples))
    whole_gradients = whole.gradients(whole_output)
    order = list(range(len(samples)))
    rng.shuffle(order)
    total = 0.0
    for part in (order[i::parts] for i in range(parts)):
        if part:
            micro = Packed([samples[s] for s in part], rng, torch.float64)
            output = micro.loss(aggregation, sizes(samples))
            total += output.loss.item()
            for position, value in micro.gradients(output).items():
                if position is not None:
                    # Not ==: the sums of log W run in another order.
                    expected = whole_gradients[part[position[0]], position[1]]
                    assert value == pytest.approx(expected, rel=1e-11, abs=1e-300)
    assert total == pytest.approx(whole_output.loss.item(), rel=1e-9, abs=1e-12)


def test_zero_advantages_give_exactly_zero_but_their_tokens_count() -> None:
    zero = ReferenceSample([-1.0, -2.0], [-1.5, -2.0], 0.0)
    packed = Packed([zero, zero], random.Random(1), torch.float32)
    output = packed.loss(Aggregation.TOKEN_MEAN, sizes([zero, zero]))
    assert output.loss.item() == 0
    assert all(value == 0 for values in packed.gradients(output).values() for value in values)
    one = ReferenceSample([-1.0, -2.0], [-1.0, -2.0], 1.0)
    output = Packed([one, zero], random.Random(1), torch.float32).loss(Aggregation.TOKEN_MEAN, sizes([one, zero]))
    assert output.loss.item() == pytest.approx(3 / 4)


def test_zero_advantage_with_infinite_kappa_and_log_pi_is_still_zero() -> None:
    packed = Packed([ReferenceSample([-INF, -1.0], [-1.0, -1.0], 0.0)], random.Random(0), torch.float32)
    output = packed.loss(Aggregation.TOKEN_MEAN, Denominators(2, 1))
    assert output.loss.item() == 0
    assert all(value == 0 for values in packed.gradients(output).values() for value in values)


@pytest.mark.parametrize("pi, mu", [(-INF, -1.0), (-1.0, -INF), (-INF, -INF)])
def test_samples_of_probability_zero_are_dropped_for_every_kernel(pi: float, mu: float) -> None:
    samples = [ReferenceSample([pi, -1.0], [mu, -1.0], 1.0), ReferenceSample([-1.0], [-1.5], 1.0)]
    packed = Packed(samples, random.Random(0), torch.float32)
    output = packed.loss(Aggregation.SEQ_MEAN_TOKEN_SUM, sizes(samples), "reinforce")
    gradients = packed.gradients(output)
    assert output.loss.item() == 0.5
    assert gradients[0, 0] == gradients[0, 1] == [0.0]
    assert gradients[1, 0] == [-0.5]
    assert output.kappa.tolist() == [0.0, 1.0]


def test_a_kernel_that_gives_nan_for_samples_without_effect_does_no_harm() -> None:
    kernel = weight_kernel("test-nan", ReinforceParams)(lambda r, p: torch.where(r.log_ratio == 0, 1.0, NAN))
    try:
        samples = [
            ReferenceSample([-INF], [-1.0], 1.0),
            ReferenceSample([-1.0], [-2.0], 0.0),
            ReferenceSample([-1.0], [-1.0], 1.0),
        ]
        packed = Packed(samples, random.Random(0), torch.float32)
        output = policy_loss(
            packed.inputs, packed.advantages, kernel, ReinforceParams(), Aggregation.TOKEN_MEAN, Denominators(4, 3)
        )
        gradients = packed.gradients(output)
        assert output.loss.item() == 0.25
        assert (gradients[0, 0], gradients[1, 0], gradients[2, 0]) == ([0.0], [0.0], [-0.25])
        assert (output.kappa[0].item(), output.kappa[2].item()) == (0.0, 1.0)
    finally:
        del KERNELS["test-nan"]


def test_the_weight_is_detached() -> None:
    samples = [ReferenceSample([-1.0, -1.0], [-1.2, -1.3], 1.0)]
    packed = Packed(samples, random.Random(0), torch.float64)
    gradients = packed.gradients(packed.loss(Aggregation.SEQ_MEAN_TOKEN_SUM, sizes(samples)))
    assert gradients[0, 0] == [pytest.approx(-phi(0.5, 1.0), rel=1e-12)]


def test_a_whole_padding_microbatch_gives_zero_with_a_gradient() -> None:
    log_pi = torch.full((4,), NAN, requires_grad=True)
    inputs = PackedLogProbs(
        log_pi, torch.full((4,), NAN), torch.full((4,), -1), torch.zeros(4, dtype=torch.bool), num_samples=1
    )
    output = policy_loss(
        inputs, torch.ones(1), KERNELS["vespo"], VespoParams(), Aggregation.TOKEN_MEAN, Denominators(10, 2)
    )
    output.loss.backward()
    assert output.loss.item() == 0
    assert log_pi.grad is not None and log_pi.grad.tolist() == [0.0] * 4


@pytest.mark.parametrize("name, value", [("log_pi", NAN), ("log_mu", NAN), ("log_pi", INF), ("log_mu", INF)])
def test_nan_in_a_real_position_names_the_samples(name: str, value: float) -> None:
    samples = [ReferenceSample([-1.0, -1.0], [-1.0, -1.0], 1.0) for _ in range(4)]
    for s in (1, 3):
        getattr(samples[s], name)[1] = value
    with pytest.raises(NonFiniteLogProbError, match=r"\[1, 3\]") as caught:
        Packed(samples, random.Random(0), torch.float32).loss(Aggregation.TOKEN_MEAN, sizes(samples))
    assert caught.value.samples == [1, 3]
    assert isinstance(caught.value, UserError)


def test_wrong_inputs_are_refused() -> None:
    good = {
        "log_pi": torch.zeros(3),
        "log_mu": torch.zeros(3),
        "sample_index": torch.zeros(3, dtype=torch.int64),
        "mask": torch.ones(3, dtype=torch.bool),
        "num_samples": 1,
    }
    PackedLogProbs(**good)
    for change in ({"mask": torch.ones(3)}, {"sample_index": torch.zeros(3)}, {"log_mu": torch.zeros(3).double()}):
        with pytest.raises(TypeError):
            PackedLogProbs(**(good | change))
    with pytest.raises(ValueError, match="shape"):
        PackedLogProbs(**(good | {"log_mu": torch.zeros(4)}))

    def loss(advantages: torch.Tensor, **change: torch.Tensor) -> None:
        inputs = PackedLogProbs(**(good | change))
        policy_loss(inputs, advantages, KERNELS["vespo"], VespoParams(), Aggregation.TOKEN_MEAN, Denominators(3, 1))

    with pytest.raises(ValueError, match="advantages"):
        loss(torch.zeros(2))
    with pytest.raises(ValueError, match="advantages"):
        loss(torch.tensor([NAN]))
    for index in (-1, 1):
        with pytest.raises(ValueError, match="sample_index"):
            loss(torch.ones(1), sample_index=torch.tensor([0, index, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["log_pi", "log_mu"])
def test_sixteen_bit_log_probs_are_refused_with_the_reason(name: str, dtype: torch.dtype) -> None:
    tensors = {"log_pi": torch.zeros(2), "log_mu": torch.zeros(2)}
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name} is {dtype}.*float32.*log W sums"):
        PackedLogProbs(
            **tensors,
            sample_index=torch.zeros(2, dtype=torch.int64),
            mask=torch.ones(2, dtype=torch.bool),
            num_samples=1,
        )


def test_a_minibatch_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        Denominators(tokens=0, samples=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    n, samples = 4096, 16
    log_pi = -torch.rand(n, generator=generator) * 3
    log_mu = log_pi + 0.05 * torch.randn(n, generator=generator)
    index = torch.randint(0, samples, (n,), generator=generator)
    mask = torch.rand(n, generator=generator) < 0.8
    advantages = torch.randn(samples, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        leaf = log_pi.to(device).requires_grad_()
        inputs = PackedLogProbs(leaf, log_mu.to(device), index.to(device), mask.to(device), samples)
        output = policy_loss(
            inputs, advantages.to(device), KERNELS["vespo"], VespoParams(), Aggregation.TOKEN_MEAN, Denominators(n, 16)
        )
        output.loss.backward()
        assert leaf.grad is not None
        results.append((output.loss.detach().cpu(), leaf.grad.cpu(), output.log_w.cpu()))
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=1e-5, atol=1e-7)
