import dataclasses
import math
import random
from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vespo_reference import ReferenceSample, log_weight, loss_and_gradients, phi

from benchmarks.measure import peak_bytes
from megatron_vespo.algorithms import importance
from megatron_vespo.algorithms.baselines import NoParams
from megatron_vespo.algorithms.loss import (
    Aggregation,
    Denominators,
    PackedLogProbs,
    PolicyLossOutput,
    policy_loss,
)
from megatron_vespo.algorithms.methods import KERNELS
from megatron_vespo.algorithms.vespo import VespoParams
from megatron_vespo.algorithms.weights import Ratios, Weighting, weight_kernel, whole_ratios
from megatron_vespo.errors import UserError
from tests.host_syncs import count_host_syncs

INF, NAN = math.inf, math.nan
COLUMNS = [field.name for field in dataclasses.fields(PolicyLossOutput) if field.name != "loss"]


class Packed:
    """Samples one after the other in one row, each token's entropy a tenth of its place in its sample."""

    def __init__(self, samples: list[ReferenceSample], dtype: torch.dtype = torch.float32) -> None:
        self.lengths = [len(sample.log_pi) for sample in samples]
        self.log_pi = torch.tensor([x for s in samples for x in s.log_pi], dtype=dtype, requires_grad=True)
        self.inputs = PackedLogProbs(
            log_pi=self.log_pi,
            log_mu=torch.tensor([x for s in samples for x in s.log_mu], dtype=dtype),
            entropy=torch.tensor([t / 10 for length in self.lengths for t in range(length)], dtype=dtype),
            sample_index=torch.tensor([s for s, length in enumerate(self.lengths) for _ in range(length)]).long(),
            num_samples=len(samples),
        )
        self.advantages = torch.tensor([s.advantage for s in samples], dtype=dtype)

    def loss(self, aggregation: Aggregation, denominators: Denominators, name: str = "vespo") -> PolicyLossOutput:
        params = VespoParams() if name == "vespo" else NoParams()
        return policy_loss(self.inputs, self.advantages, Weighting(KERNELS[name], params), aggregation, denominators)

    def gradients(self, output: PolicyLossOutput) -> list[list[float]]:
        """Of each sample's tokens."""
        (gradient,) = torch.autograd.grad(output.loss, self.log_pi)
        return [part.tolist() for part in gradient.split(self.lengths)]


def sizes(samples: list[ReferenceSample]) -> Denominators:
    return Denominators(max(1, sum(len(s.log_pi) for s in samples)), len(samples))


def denominator(aggregation: Aggregation, of: Denominators) -> int:
    return of.tokens if aggregation is Aggregation.TOKEN_MEAN else of.samples


def as_float32(samples: list[ReferenceSample]) -> list[ReferenceSample]:
    """The values a float32 tensor really holds, so that only the computation is compared."""

    def rounded(values: list[float]) -> list[float]:
        return torch.tensor(values, dtype=torch.float32).tolist()

    return [ReferenceSample(rounded(s.log_pi), rounded(s.log_mu), rounded([s.advantage])[0]) for s in samples]


def chunks_of(tokens: int) -> AbstractContextManager[int]:
    return mock.patch.object(importance, "TOKENS_PER_CHUNK", tokens)


def compare(samples: list[ReferenceSample], chunk: int, aggregation: Aggregation, dtype: torch.dtype) -> None:
    rel, tiny = (1e-10, 1e-300) if dtype is torch.float64 else (2e-5, 1e-37)
    packed = Packed(samples, dtype)
    with chunks_of(chunk):
        output = packed.loss(aggregation, sizes(samples))
    expected_loss, expected = loss_and_gradients(samples, denominator(aggregation, sizes(samples)))
    # Terms of both signs cancel, so the tolerance is relative to their absolute sum.
    terms = [
        g * sample.log_pi[t] for g_s, sample in zip(expected, samples, strict=True) for t, g in enumerate(g_s) if g
    ]
    assert output.loss.item() == pytest.approx(expected_loss, rel=rel, abs=rel * sum(map(abs, terms)) + tiny)
    actual = packed.gradients(output)
    for s, (gradients, sample) in enumerate(zip(expected, samples, strict=True)):
        exactly_zero = sample.advantage == 0 or abs(log_weight(sample)) > 600
        expected_here = [0.0] * len(gradients) if exactly_zero else pytest.approx(gradients, rel=rel, abs=tiny)
        assert actual[s] == expected_here


def moderate_samples() -> st.SearchStrategy[list[ReferenceSample]]:
    return samples_of(st.floats(-3, 3))


def samples_of(ratio: st.SearchStrategy[float]) -> st.SearchStrategy[list[ReferenceSample]]:
    token = st.tuples(st.floats(-30, 0), ratio)
    sample = st.tuples(st.lists(token, max_size=6), st.one_of(st.just(0.0), st.floats(-3, 3, width=32)))

    def build(item: tuple[list[tuple[float, float]], float]) -> ReferenceSample:
        tokens, advantage = item
        return ReferenceSample([pi for pi, _ in tokens], [pi - ratio for pi, ratio in tokens], advantage)

    return st.lists(sample.map(build), min_size=1, max_size=6)


# The others divide by lengths besides; test_paper_gradients has them.
PLAIN = [Aggregation.TOKEN_MEAN, Aggregation.SEQ_MEAN_TOKEN_SUM]
AGGREGATIONS = st.sampled_from(PLAIN)
CHUNKS = st.integers(1, 9)


@settings(max_examples=300, deadline=None)
@given(samples_of(st.one_of(st.floats(-1000, 1000), st.floats(-1, 1))), CHUNKS, AGGREGATIONS)
def test_float64_equals_the_reference(samples: list[ReferenceSample], chunk: int, aggregation: Aggregation) -> None:
    compare(samples, chunk, aggregation, torch.float64)


@settings(max_examples=300, deadline=None)
@given(moderate_samples(), CHUNKS, AGGREGATIONS)
def test_float32_equals_the_reference(samples: list[ReferenceSample], chunk: int, aggregation: Aggregation) -> None:
    compare(as_float32(samples), chunk, aggregation, torch.float32)


@pytest.mark.parametrize("aggregation", PLAIN)
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
    for chunk in range(1, 21):
        compare(samples, chunk, aggregation, dtype)
    output = Packed(samples, dtype).loss(aggregation, sizes(samples))
    assert output.log_w.tolist() == [log_weight(s) for s in samples]
    assert output.log_w[3] == 0
    expected = [phi(log_weight(s), s.advantage) if s.log_pi else 0.0 for s in samples]
    assert output.kappa.tolist() == pytest.approx(expected, rel=1e-5)
    assert [k == 0 for k in output.kappa.tolist()] == [e == 0 for e in expected]
    assert output.n_tokens.tolist() == [len(s.log_pi) for s in samples]
    assert output.sum_log_pi[:4].tolist() == [-3.5, -3.0, -7.0, 0.0]
    assert output.sum_abs_log_ratio[:4].tolist() == [1.75, 0.75, 5.0, 0.0]
    assert output.max_abs_log_ratio[:4].tolist() == [1.0, 0.5, 3.0, 0.0]
    assert output.sum_entropy.tolist() == pytest.approx([0.3, 0.1, 0.1, 0.0] + [0.1, 0.0] + [0.1] * 4 + [0.0])
    assert output.n_nonfinite.tolist() == [0.0] * len(samples)
    assert output.sample_loss.sum().item() == pytest.approx(output.loss.item(), rel=1e-6)
    for name in COLUMNS:
        column = getattr(output, name)
        assert (column.dtype, column.shape, column.requires_grad) == (dtype, (len(samples),), False), name


@settings(max_examples=100, deadline=None)
@given(moderate_samples(), AGGREGATIONS, st.integers(1, 4), st.randoms())
def test_microbatches_sum_to_the_whole(
    samples: list[ReferenceSample], aggregation: Aggregation, parts: int, rng: random.Random
) -> None:
    whole = Packed(samples, torch.float64)
    whole_output = whole.loss(aggregation, sizes(samples))
    whole_gradients = whole.gradients(whole_output)
    order = list(range(len(samples)))
    rng.shuffle(order)
    total = 0.0
    for part in (order[i::parts] for i in range(parts)):
        if part:
            micro = Packed([samples[s] for s in part], torch.float64)
            output = micro.loss(aggregation, sizes(samples))
            total += output.loss.item()
            for s, gradients in zip(part, micro.gradients(output), strict=True):
                # Not ==: vectors of another length may round exp differently.
                assert gradients == pytest.approx(whole_gradients[s], rel=1e-11, abs=1e-300)
    assert total == pytest.approx(whole_output.loss.item(), rel=1e-9, abs=1e-12)


def random_packed(lengths: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Packed:
    """Samples near on-policy, so that every kappa is well away from 0, with one advantage in four 0."""
    rng = random.Random(seed)

    def sample(length: int) -> ReferenceSample:
        log_pi = [-3 * rng.random() for _ in range(length)]
        return ReferenceSample(log_pi, [x + rng.gauss(0, 0.1) for x in log_pi], rng.choice([0.0, 1.5, -0.5, -2.0]))

    return Packed([sample(length) for length in lengths], dtype)


def token_level(ratios: Ratios, params: NoParams) -> torch.Tensor:
    """A kernel of both the token and its sample."""
    return torch.exp(ratios.log_ratio) + ratios.log_w[ratios.sample_index] * ratios.advantages[ratios.sample_index]


@pytest.mark.parametrize("chunk", [1, 3, 8, 1000])
def test_any_chunk_gives_the_plain_formula_and_its_autograd_for_a_token_level_kernel(chunk: int) -> None:
    packed = random_packed([5, 0, 1, 9, 4, 0, 2], torch.float64)
    inputs, advantages = packed.inputs, packed.advantages
    weight = token_level(
        whole_ratios(inputs.log_pi.detach(), inputs.log_mu, None, inputs.sample_index, advantages), NoParams()
    )
    plain = -(weight * advantages[inputs.sample_index] * inputs.log_pi).sum() / 21
    (expected,) = torch.autograd.grad(plain, packed.log_pi)

    kernel = weight_kernel("test-token-level", NoParams)(token_level)
    try:
        with chunks_of(chunk):
            output = policy_loss(
                inputs, advantages, Weighting(kernel, NoParams()), Aggregation.TOKEN_MEAN, Denominators(21, 7)
            )
    finally:
        del KERNELS["test-token-level"]
    torch.testing.assert_close(output.loss.detach(), plain.detach())
    torch.testing.assert_close(torch.autograd.grad(output.loss, packed.log_pi)[0], expected)
    torch.testing.assert_close(
        output.kappa,
        torch.stack([part.mean() if len(part) else torch.zeros(()).double() for part in weight.split(packed.lengths)]),
    )


@pytest.mark.parametrize("chunk", [1, 3, 7, 40])
def test_chunks_change_no_column(chunk: int) -> None:
    outputs = []
    for tokens in (chunk, 1000):
        packed = random_packed([5, 0, 1, 9, 4, 0, 20])
        with chunks_of(tokens):
            output = packed.loss(Aggregation.SEQ_MEAN_TOKEN_SUM, Denominators(39, 7))
        columns = {name: getattr(output, name) for name in ["loss", *COLUMNS]}
        outputs.append(columns | {"gradient": torch.tensor([x for part in packed.gradients(output) for x in part])})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=0)
    assert (outputs[0]["gradient"] != 0).sum() > 10


def test_zero_advantages_give_exactly_zero_but_their_tokens_count() -> None:
    zero = ReferenceSample([-1.0, -2.0], [-1.5, -2.0], 0.0)
    packed = Packed([zero, zero])
    output = packed.loss(Aggregation.TOKEN_MEAN, sizes([zero, zero]))
    assert output.loss.item() == 0
    assert packed.gradients(output) == [[0.0, 0.0]] * len(packed.lengths)
    one = ReferenceSample([-1.0, -2.0], [-1.0, -2.0], 1.0)
    output = Packed([one, zero]).loss(Aggregation.TOKEN_MEAN, sizes([one, zero]))
    assert output.loss.item() == pytest.approx(3 / 4)


def test_zero_advantage_with_infinite_kappa_and_log_pi_is_still_zero() -> None:
    packed = Packed([ReferenceSample([-INF, -1.0], [-1.0, -1.0], 0.0)])
    output = packed.loss(Aggregation.TOKEN_MEAN, Denominators(2, 1))
    assert output.loss.item() == 0
    assert packed.gradients(output) == [[0.0, 0.0]] * len(packed.lengths)


@pytest.mark.parametrize("pi, mu", [(-INF, -1.0), (-1.0, -INF), (-INF, -INF)])
def test_samples_of_probability_zero_are_dropped_for_every_kernel(pi: float, mu: float) -> None:
    samples = [ReferenceSample([pi, -1.0], [mu, -1.0], 1.0), ReferenceSample([-1.0], [-1.5], 1.0)]
    packed = Packed(samples)
    output = packed.loss(Aggregation.SEQ_MEAN_TOKEN_SUM, sizes(samples), "reinforce")
    gradients = packed.gradients(output)
    assert output.loss.item() == 0.5
    assert gradients == [[0.0, 0.0], [-0.5]]
    assert output.kappa.tolist() == [0.0, 1.0]


def test_a_kernel_that_gives_nan_for_samples_without_effect_does_no_harm() -> None:
    kernel = weight_kernel("test-nan", NoParams)(lambda r, p: torch.where(r.log_ratio == 0, 1.0, NAN))
    try:
        samples = [
            ReferenceSample([-INF], [-1.0], 1.0),
            ReferenceSample([-1.0], [-2.0], 0.0),
            ReferenceSample([-1.0], [-1.0], 1.0),
        ]
        packed = Packed(samples)
        output = policy_loss(
            packed.inputs, packed.advantages, Weighting(kernel, NoParams()), Aggregation.TOKEN_MEAN, Denominators(4, 3)
        )
        gradients = packed.gradients(output)
        assert output.loss.item() == 0.25
        assert gradients == [[0.0], [0.0], [-0.25]]
        assert (output.kappa[0].item(), output.kappa[2].item()) == (0.0, 1.0)
    finally:
        del KERNELS["test-nan"]


def test_sums_over_a_long_response_keep_their_digits() -> None:
    tokens = 200_000
    generator = torch.Generator().manual_seed(0)
    log_pi = -torch.rand(tokens, generator=generator)
    log_mu = -torch.rand(tokens, generator=generator)
    index = torch.zeros(tokens, dtype=torch.int64)
    inputs = PackedLogProbs(log_pi.requires_grad_(), log_mu, log_pi.detach().neg(), index, 1)
    output = policy_loss(
        inputs, torch.ones(1), Weighting(KERNELS["reinforce"], NoParams()), Aggregation.TOKEN_MEAN, Denominators(1, 1)
    )
    total = math.fsum(log_pi.tolist())
    assert output.log_w.item() == pytest.approx(math.fsum((log_pi - log_mu).tolist()), rel=2e-7)
    assert output.sum_log_pi.item() == pytest.approx(total, rel=2e-7)
    assert output.sum_entropy.item() == output.loss.item() == pytest.approx(-total, rel=2e-7)


def test_the_weight_is_detached() -> None:
    samples = [ReferenceSample([-1.0, -1.0], [-1.2, -1.3], 1.0)]
    packed = Packed(samples, torch.float64)
    gradients = packed.gradients(packed.loss(Aggregation.SEQ_MEAN_TOKEN_SUM, sizes(samples)))
    assert gradients == [pytest.approx([-phi(0.5, 1.0)] * 2, rel=1e-12)]


def test_the_gradient_is_scaled_by_what_comes_after_and_flows_on_to_what_came_before() -> None:
    packed = random_packed([4, 3], torch.float64)
    (expected,) = torch.autograd.grad(
        packed.loss(Aggregation.TOKEN_MEAN, Denominators(7, 2), "reinforce").loss, packed.log_pi
    )
    leaf = (packed.log_pi.detach() / 2).requires_grad_()
    for _ in range(2):  # the second adds to the first
        packed.inputs = dataclasses.replace(packed.inputs, log_pi=2 * leaf)
        (5 * packed.loss(Aggregation.TOKEN_MEAN, Denominators(7, 2), "reinforce").loss).backward()
    assert leaf.grad is not None and leaf.grad.abs().max() > 0.1
    torch.testing.assert_close(leaf.grad, 20 * expected)


def test_a_second_backward_is_refused() -> None:
    packed = random_packed([4, 3])
    loss = packed.loss(Aggregation.TOKEN_MEAN, Denominators(7, 2)).loss
    loss.backward(retain_graph=True)
    before = packed.log_pi.grad.clone()
    with pytest.raises(RuntimeError, match="second backward through policy_loss"):
        loss.backward()
    assert torch.equal(packed.log_pi.grad, before)


def test_a_gradient_of_the_gradient_is_refused() -> None:
    packed = random_packed([4, 3])
    loss = packed.loss(Aggregation.TOKEN_MEAN, Denominators(7, 2)).loss
    scale = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad(loss * scale, packed.log_pi, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_microbatch_without_tokens_gives_zero_with_a_gradient() -> None:
    packed = Packed([ReferenceSample([], [], 1.0)] * 2)
    output = packed.loss(Aggregation.TOKEN_MEAN, Denominators(10, 4))
    output.loss.backward()
    assert output.loss.item() == 0
    assert packed.log_pi.grad is not None and packed.log_pi.grad.shape == (0,)
    for name in COLUMNS:
        assert getattr(output, name).tolist() == [0.0, 0.0], name


@pytest.mark.parametrize("kernel", ["vespo", "reinforce"])
@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("name, value", [("log_pi", NAN), ("log_mu", NAN), ("log_pi", INF), ("log_mu", INF)])
def test_nan_stays_in_its_sample(name: str, value: float, chunk: int, kernel: str) -> None:
    def losses(advantages: list[float], poison: bool) -> tuple[Packed, PolicyLossOutput]:
        samples = [ReferenceSample([-1.0, -0.5, -2.0], [-1.1, -0.75, -2.0], a) for a in advantages]
        # Probability 0 beside a NaN must not turn it into an infinite log W.
        samples[3].log_pi[0] = -INF
        for s in (1, 3) if poison else ():
            getattr(samples[s], name)[1:] = [value, value]
        packed = Packed(samples)
        with chunks_of(chunk):
            return packed, packed.loss(Aggregation.TOKEN_MEAN, sizes(samples), kernel)

    packed, output = losses([1.0, -2.0, -1.0, 1.0, 0.5], poison=True)
    clean, expected = losses([1.0, 0.0, -1.0, 0.0, 0.5], poison=False)
    assert output.n_nonfinite.tolist() == [0, 2, 0, 2, 0]
    assert output.log_w.isnan().tolist() == [False, True, False, True, False]
    assert output.loss.item() == expected.loss.item() != 0
    assert output.sample_loss.tolist() == expected.sample_loss.tolist()
    gradients = packed.gradients(output)
    assert gradients == clean.gradients(expected)
    assert gradients[1] == gradients[3] == [0.0] * 3
    for column in COLUMNS:
        for s in (0, 2, 4):
            assert getattr(output, column)[s] == getattr(expected, column)[s], column
    assert output.kappa[[1, 3]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kernel", ["vespo", "reinforce"])
def test_no_value_is_read_on_the_host(kernel: str) -> None:
    samples = [ReferenceSample([-1.0, x], [-1.5, -1.0], a) for x in (-1.0, -INF, NAN) for a in (1.0, 0.0, -1.0)]
    packed = Packed([*samples, ReferenceSample([], [], 1.0)])
    with count_host_syncs() as syncs, chunks_of(3):
        packed.loss(Aggregation.TOKEN_MEAN, sizes(samples), kernel).loss.backward()
    assert syncs.events == []


def test_the_peak_beside_the_inputs_is_the_gradient_and_a_few_chunks() -> None:
    tokens, samples = 4 * 2**20, 64
    generator = torch.Generator().manual_seed(0)
    log_pi = -torch.rand(tokens, generator=generator)
    inputs = PackedLogProbs(
        log_pi.clone().requires_grad_(),
        log_pi,
        torch.rand(tokens, generator=generator),
        torch.arange(samples).repeat_interleave(tokens // samples),
        samples,
    )
    packed = sum(x.nbytes for x in (inputs.log_pi, inputs.log_mu, inputs.entropy, inputs.sample_index))
    assert packed == 20 * tokens

    def work() -> None:
        output = policy_loss(
            inputs,
            torch.ones(samples),
            Weighting(KERNELS["vespo"], VespoParams()),
            Aggregation.TOKEN_MEAN,
            Denominators(tokens, samples),
        )
        output.loss.backward()

    peak = peak_bytes(work)
    gradient = inputs.log_pi.grad
    assert gradient is not None and gradient.nbytes == packed / 5
    # The chunks and columns: 0.3 % of the input here.
    assert gradient.nbytes <= peak <= gradient.nbytes + 2**18


def test_wrong_inputs_are_refused() -> None:
    good = {
        "log_pi": torch.zeros(3),
        "log_mu": torch.zeros(3),
        "entropy": torch.zeros(3),
        "sample_index": torch.zeros(3, dtype=torch.int64),
        "num_samples": 1,
    }
    PackedLogProbs(**good)
    for name in ("log_pi", "log_mu", "entropy", "sample_index"):
        with pytest.raises(TypeError, match="log_mu" if name == "log_pi" else name):
            PackedLogProbs(**(good | {name: torch.zeros(3).double()}))
        with pytest.raises(ValueError, match="shape"):
            PackedLogProbs(**(good | {name: torch.zeros(4).to(good[name].dtype)}))
    with pytest.raises(ValueError, match="shape"):
        PackedLogProbs(**{name: x[None] if torch.is_tensor(x) else x for name, x in good.items()})

    def loss(advantages: torch.Tensor, **change: torch.Tensor) -> None:
        inputs = PackedLogProbs(**(good | change))
        policy_loss(
            inputs, advantages, Weighting(KERNELS["vespo"], VespoParams()), Aggregation.TOKEN_MEAN, Denominators(3, 1)
        )

    loss(torch.zeros(1))
    with pytest.raises(ValueError, match="advantages"):
        loss(torch.zeros(2))
    for index in (-1, 1):  # by torch itself, on a GPU as a failure of the device
        with pytest.raises((IndexError, RuntimeError), match="index"):
            loss(torch.ones(1), sample_index=torch.tensor([0, index, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["log_pi", "log_mu"])
def test_sixteen_bit_log_probs_are_refused_with_the_reason(name: str, dtype: torch.dtype) -> None:
    tensors = {"log_pi": torch.zeros(2), "log_mu": torch.zeros(2)}
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(TypeError, match=f"{name} is {dtype}.*float32.*log W sums"):
        PackedLogProbs(**tensors, entropy=torch.zeros(2), sample_index=torch.zeros(2, dtype=torch.int64), num_samples=1)


def test_a_minibatch_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="empty"):
        Denominators(tokens=0, samples=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu_without_a_wait_and_with_the_same_peak() -> None:
    generator = torch.Generator().manual_seed(0)
    n, samples = 2**20, 64
    log_pi = -torch.rand(n, generator=generator) * 3
    log_mu = log_pi + 0.005 * torch.randn(n, generator=generator)
    entropy = torch.rand(n, generator=generator)
    index = torch.randint(0, samples, (n,), generator=generator).sort().values
    advantages = torch.randn(samples, generator=generator)

    def run(inputs: PackedLogProbs, advantages: torch.Tensor) -> PolicyLossOutput:
        denominators = Denominators(n, samples)
        output = policy_loss(
            inputs, advantages, Weighting(KERNELS["vespo"], VespoParams()), Aggregation.TOKEN_MEAN, denominators
        )
        output.loss.backward()
        return output

    results = []
    for device in ("cpu", "cuda"):
        moved = [x.to(device) for x in (log_mu, entropy, index)]
        leaf = log_pi.to(device).requires_grad_()
        inputs, advantages = PackedLogProbs(leaf, *moved, samples), advantages.to(device)
        if device == "cuda":
            run(dataclasses.replace(inputs, log_pi=leaf.detach().requires_grad_()), advantages)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            torch.cuda.set_sync_debug_mode("error")
        try:
            output = run(inputs, advantages)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert leaf.grad is not None
        results.append((output.loss.detach().cpu(), leaf.grad.cpu(), output.log_w.cpu()))
    peak = torch.cuda.max_memory_allocated() - before
    assert 4 * n <= peak <= 4 * n + 2**20
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cpu, cuda, rtol=1e-5, atol=1e-7)
