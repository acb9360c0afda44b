"""Time and peak memory of the policy loss with all its metrics, forward and backward, against plain torch.

PYTHONPATH=. .venv/bin/python benchmarks/loss.py [--repeats 15]

On one CPU thread, the ways taking turns. The plain ways compute the same figures, every intermediate a whole tensor and
the gradient autograd's:

- packed: the same rows as ours, float64 sums by sample with ``index_add``: what ours would be without its chunks and
  its known gradient.
- padded: one row of [samples, longest response] and a mask, the usual layout, float32 sums along the rows.

Response lengths are drawn evenly between a tenth of the longest and the longest, 64 of them, so that 45 % of a padded
tensor is padding. Peaks are divided by the packed input, 20 bytes a response token: log_pi, log_mu and entropy in
float32, sample_index in int64; "beside" is the peak beyond the way's own inputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import peak_bytes
from megatron_vespo.algorithms.loss import Aggregation, Denominators, PackedLogProbs, policy_loss
from megatron_vespo.algorithms.methods import KERNELS
from megatron_vespo.algorithms.vespo import VespoParams, vespo_phi
from megatron_vespo.algorithms.weights import Weighting

SAMPLES = 64
PARAMS = VespoParams()
Result = tuple[Tensor, tuple[Tensor, ...]]


@dataclass
class Case:
    """One microbatch in both layouts; ``lengths`` [S] sum to the tokens, padding is 0."""

    lengths: Tensor
    log_pi: Tensor
    log_mu: Tensor
    entropy: Tensor
    sample_index: Tensor
    advantages: Tensor
    padded_log_pi: Tensor
    padded_log_mu: Tensor
    padded_entropy: Tensor
    mask: Tensor


def make_case(tokens: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    shares = torch.linspace(0.1, 1, SAMPLES, dtype=torch.float64)
    bounds = (shares.cumsum(0) / shares.sum() * tokens).round().long()
    lengths = torch.diff(bounds, prepend=torch.zeros(1, dtype=torch.int64))
    lengths = lengths[torch.randperm(SAMPLES, generator=generator)]
    log_pi = -3 * torch.rand(tokens, generator=generator)
    log_mu = log_pi + torch.randn(tokens, generator=generator) / tokens**0.5
    entropy = torch.rand(tokens, generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    padded = [torch.zeros(mask.shape).masked_scatter_(mask, x) for x in (log_pi, log_mu, entropy)]
    return Case(
        lengths,
        log_pi.requires_grad_(),
        log_mu,
        entropy,
        torch.arange(SAMPLES).repeat_interleave(lengths),
        torch.randn(SAMPLES, generator=generator),
        padded[0].requires_grad_(),
        padded[1],
        padded[2],
        mask,
    )


def ours(case: Case) -> Result:
    inputs = PackedLogProbs(case.log_pi, case.log_mu, case.entropy, case.sample_index, SAMPLES)
    denominators = Denominators(case.log_pi.numel(), SAMPLES)
    o = policy_loss(inputs, case.advantages, Weighting(KERNELS["vespo"], PARAMS), Aggregation.TOKEN_MEAN, denominators)
    sums = (o.sum_log_pi, o.sum_abs_log_ratio, o.max_abs_log_ratio, o.sum_entropy, o.n_tokens, o.n_nonfinite)
    return o.loss, (o.sample_loss, o.log_w, o.kappa, *sums)


def phi(log_w: Tensor, advantages: Tensor) -> Tensor:
    positive = vespo_phi(log_w, PARAMS.c1_pos, PARAMS.c2_pos, PARAMS.log_w_limit)
    negative = vespo_phi(log_w, PARAMS.c1_neg, PARAMS.c2_neg, PARAMS.log_w_limit)
    return torch.where(advantages >= 0, positive, negative)


def plain_packed(case: Case) -> Result:
    index = case.sample_index

    def total(values: Tensor) -> Tensor:
        return torch.zeros(SAMPLES, dtype=torch.float64).index_add(0, index, values.detach().double()).float()

    log_ratio = (case.log_pi - case.log_mu).detach()
    log_w = total(log_ratio)
    kappa = phi(log_w, case.advantages)[index]
    heard = log_w.isfinite()[index] & (case.advantages[index] != 0)
    zero = torch.zeros_like(kappa)
    coefficient = torch.where(heard, kappa * case.advantages[index] / case.log_pi.numel(), zero)
    losses = -coefficient * torch.where(heard, case.log_pi, zero)
    largest = torch.zeros(SAMPLES).scatter_reduce(0, index, log_ratio.abs(), reduce="amax")
    n_tokens = total(torch.ones_like(kappa))
    bad = total(~((case.log_pi < torch.inf) & (case.log_mu < torch.inf)))
    sums = (total(case.log_pi), total(log_ratio.abs()), largest, total(case.entropy), n_tokens, bad)
    return losses.sum(), (total(losses), log_w, total(kappa) / n_tokens.clamp(min=1), *sums)


def plain_padded(case: Case) -> Result:
    mask = case.mask
    log_pi, log_mu = case.padded_log_pi, case.padded_log_mu

    def total(values: Tensor) -> Tensor:
        return (values.detach() * mask).sum(1).float()

    log_ratio = (log_pi - log_mu).detach() * mask
    log_w = total(log_ratio)
    kappa = phi(log_w, case.advantages)[:, None].expand_as(mask) * mask
    heard = mask & (log_w.isfinite() & (case.advantages != 0))[:, None]
    zero = torch.zeros_like(kappa)
    coefficient = torch.where(heard, kappa * case.advantages[:, None] / case.log_pi.numel(), zero)
    losses = -coefficient * torch.where(heard, log_pi, zero)
    n_tokens = total(torch.ones_like(kappa))
    bad = total(~((log_pi < torch.inf) & (log_mu < torch.inf)))
    largest = log_ratio.abs().amax(1)
    sums = (total(log_pi), total(log_ratio.abs()), largest, total(case.padded_entropy), n_tokens, bad)
    return losses.sum(), (total(losses), log_w, total(kappa) / n_tokens.clamp(min=1), *sums)


WAYS: dict[str, Callable[[Case], Result]] = {"ours": ours, "packed": plain_packed, "padded": plain_padded}


def own_input_bytes(case: Case, way: str) -> int:
    if way == "padded":
        tensors = (case.padded_log_pi, case.padded_log_mu, case.padded_entropy, case.mask)
    else:
        tensors = (case.log_pi, case.log_mu, case.entropy, case.sample_index)
    return sum(tensor.nbytes for tensor in tensors)


def step(case: Case, way: str) -> tuple[Tensor, ...]:
    """Forward and backward; the gradient is left in ``grad``, where the model's backward would take it."""
    case.log_pi.grad = case.padded_log_pi.grad = None
    loss, columns = WAYS[way](case)
    loss.backward()
    return (loss.detach(), *columns)


def check_all_agree(case: Case) -> None:
    expected = step(case, "ours")
    for way in ("packed", "padded"):
        for ours_, plain in zip(expected, step(case, way), strict=True):
            torch.testing.assert_close(ours_, plain, rtol=2e-3 if way == "padded" else 1e-5, atol=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'tokens':>8}  {'way':6}  {'ms':>7}  {'time':>5}  {'peak':>6}  {'beside':>6}  {'without gradient':>16}")
    for tokens in (2**14, 2**16, 2**20, 2**22):
        case = make_case(tokens)
        check_all_agree(case)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options.repeats if tokens < 2**22 else 3):
            for way in WAYS:
                start = time.process_time()
                step(case, way)
                seconds[way].append(time.process_time() - start)
        packed_input = own_input_bytes(case, "ours")
        for way in WAYS:
            case.log_pi.grad = case.padded_log_pi.grad = None
            beside = peak_bytes(partial(step, case, way))
            own = own_input_bytes(case, way)
            gradient = case.padded_log_pi if way == "padded" else case.log_pi
            ratios = [x / packed_input for x in (own + beside, beside, own + beside - gradient.nbytes)]
            median = statistics.median(seconds[way])
            time_ratio = median / statistics.median(seconds["ours"])
            print(
                f"{tokens:8}  {way:6}  {1e3 * median:7.2f}  {time_ratio:5.2f}"
                f"  {ratios[0]:6.3f}  {ratios[1]:6.3f}  {ratios[2]:16.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
