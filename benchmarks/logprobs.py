"""Time and peak memory of log-probabilities and entropy, forward and backward, against the matrix products alone.

PYTHONPATH=. .venv/bin/python benchmarks/logprobs.py [--rows 512] [--hidden 2048] [--vocab 151936] [--dtype bfloat16]

On one CPU thread, the ways taking turns, process CPU time:

- floor: what recomputing the logits cannot avoid, four bare matrix products into memory that is there: logits, logits
  again, gradient of the hidden states, gradient of the weight.
- ours: ``token_log_probs`` and its backward pass.
- half trained: the same with half of the rows after ``trained``; its own floor would be five eighths.
- forward only: ``token_log_probs`` without gradients; its own floor would be a quarter.
- plain: all logits at once, ``log_softmax`` in float32, its entropy, and autograd's backward pass.

"beside" is the peak beyond inputs and weight gradient; the gradient of the hidden states is part of it. What oneDNN
takes for itself is not (see ``peak_bytes``); going by the resident set, that is 0.2 MiB.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import peak_bytes
from megatron_vespo import parallel
from megatron_vespo.policy.logprobs import TokenLogProbs, token_log_probs


@dataclass
class Case:
    """hidden [R, H], weight [V, H], targets [R], coefficients of the log-probabilities [R]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    coefficients: Tensor


def make_case(rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Case:
    torch.manual_seed(0)
    return Case(
        torch.randn(rows, hidden, device=device).to(dtype).requires_grad_(),
        (torch.randn(vocab, hidden, device=device) * 2 / hidden**0.5).to(dtype).requires_grad_(),
        torch.randint(vocab, (rows,), device=device),
        torch.randn(rows, device=device) / rows,
    )


def ours(case: Case, trained: int) -> TokenLogProbs:
    out = token_log_probs(
        case.hidden, case.weight, case.targets, trained=trained, vocab_size=len(case.weight), temperature=1.0
    )
    if trained:
        (out.log_pi * case.coefficients).sum().backward()
    return out


def forward_only(case: Case) -> None:
    with torch.no_grad():
        ours(case, 0)


def plain(case: Case) -> TokenLogProbs:
    log_p = F.linear(case.hidden, case.weight).float().log_softmax(-1)
    log_pi = log_p.gather(1, case.targets[:, None]).squeeze(1)
    with torch.no_grad():
        out = TokenLogProbs(log_pi.detach(), -(log_p.exp() * log_p).sum(1), log_p.amax(1) <= log_pi)
    (log_pi * case.coefficients).sum().backward()
    return out


def make_floor(case: Case) -> Callable[[], None]:
    hidden, weight = case.hidden.detach(), case.weight.detach()
    logits = hidden.new_empty(len(hidden), len(weight))
    logits_grad = torch.full_like(logits, 1e-3)
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def floor() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits_grad, weight, out=hidden_grad)
        torch.mm(logits_grad.t(), hidden, out=weight_grad)

    return floor


def check_both_agree(case: Case) -> None:
    found = ours(case, len(case.hidden))
    gradients = [case.hidden.grad, case.weight.grad]
    case.hidden.grad = case.weight.grad = None
    wanted = plain(case)
    tolerance = 2e-2 if case.hidden.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.log_pi.detach(), wanted.log_pi, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(found.entropy, wanted.entropy, atol=tolerance, rtol=tolerance)
    for ours_, plain_ in zip(gradients, [case.hidden.grad, case.weight.grad], strict=True):
        assert ours_ is not None and plain_ is not None
        assert (ours_ - plain_).norm() < tolerance * plain_.norm()
    case.hidden.grad = case.weight.grad = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    parallel.tensor_parallel_size, parallel.tensor_parallel_rank = lambda: 1, lambda: 0  # no process group is needed
    case = make_case(options.rows, options.hidden, options.vocab, getattr(torch, options.dtype))
    check_both_agree(case)
    ways: dict[str, Callable[[], object]] = {
        "floor": make_floor(case),
        "ours": partial(ours, case, options.rows),
        "half trained": partial(ours, case, options.rows // 2),
        "forward only": partial(forward_only, case),
        "plain": partial(plain, case),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(options.repeats + 1):
        for way, work in ways.items():
            case.hidden.grad = case.weight.grad = None
            start = time.process_time()
            work()
            if repeat:  # the first round warms up
                seconds[way].append(time.process_time() - start)
    print(f"{options.rows} rows, hidden {options.hidden}, vocabulary {options.vocab}, {options.dtype}, 1 thread")
    print(f"{'way':12}  {'min s':>7}  {'median s':>8}  {'min / floor':>11}  {'median / floor':>14}  {'beside MiB':>10}")
    for way, work in ways.items():
        case.hidden.grad = case.weight.grad = None
        beside = peak_bytes(work, result_bytes=case.weight.nbytes)
        least, median = min(seconds[way]), statistics.median(seconds[way])
        ratios = least / min(seconds["floor"]), median / statistics.median(seconds["floor"])
        print(f"{way:12}  {least:7.3f}  {median:8.3f}  {ratios[0]:11.3f}  {ratios[1]:14.3f}  {beside / 2**20:10.2f}")


if __name__ == "__main__":
    main()
