"""One training step of a Qwen3-30B-A3B with fewer layers on one GPU: packed samples, VESPO loss, distributed optimizer.

python -m benchmarks.gpu.train_step --precision bf16|experts|all [--recipe blockwise] [--layers 4] [--tokens 32768]

The real ``Policy.forward_backward`` and ``optim_step``. A layer takes 11 GB: weights in bfloat16, gradients, master
weights and Adam's moments in float32; embedding and output layer take as much as one layer. FLOPs are those of
``models/cost.py``, three forward passes, with the output layer for response tokens alone; what is computed twice (the
logits) counts once. With few layers the output layer is more than half of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.gpu import models
from benchmarks.gpu.measure import Setting, free_memory, peak_flops
from benchmarks.gpu.report import Report
from benchmarks.gpu.samples import fed, with_tokens
from benchmarks.gpu.script import finish, join, options_of, parser, setting_of
from megatron_vespo.algorithms.loss import Aggregation
from megatron_vespo.algorithms.methods import KERNELS
from megatron_vespo.algorithms.vespo import VespoParams
from megatron_vespo.algorithms.weights import Weighting
from megatron_vespo.batching import plan_microbatches
from megatron_vespo.models.build import ddp_config, optimizer_config
from megatron_vespo.models.cost import sample_cost
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.precision import packed_alignment
from megatron_vespo.policy.objectives import PolicyGradient, denominators
from megatron_vespo.policy.policy import Policy
from megatron_vespo.types import Sample

OPTIMIZER = {"lr": 1e-6, "clip_grad": 1.0, "weight_decay": 0.0, "use_distributed_optimizer": True}
PRECISIONS = ("bf16", "experts", "all")


@dataclass(frozen=True, slots=True)
class Work:
    """What a step trains on."""

    samples: list[Sample]
    plan: list[list[int]]

    @property
    def tokens(self) -> int:
        """Positions that go through the model, padding aside."""
        return sum(fed(self.samples))


def make_policy(setting: Setting, facts: Architecture, precision: str, recipe: str) -> Policy:
    """The policy, with random weights."""
    section = models.fp8_section(None if precision == "bf16" else recipe) | OPTIMIZER
    config, chunks = models.model(setting, facts, section, "all" if precision == "all" else "experts")
    return Policy(
        chunks,
        ddp_config=ddp_config(section),
        optimizer_config=optimizer_config(section),
        total_steps=100,
        warmup_steps=0,
        decay_style="constant",
        vocab_size=facts.vocab_size,
        temperature=1.0,
        alignment=packed_alignment(config),
    )


def make_work(setting: Setting, facts: Architecture, tokens: int, microbatch: int) -> Work:
    """Packed microbatches of about equal cost."""
    if setting.tiny:
        tokens, microbatch = 256, 128
    samples = with_tokens(tokens, microbatch // 2, facts.vocab_size)
    return Work(samples, plan_microbatches(fed(samples), 1, microbatch, sample_cost(facts)).ranks[0])


def nearly_on_policy(policy: Policy, work: Work) -> Work:
    """The same with the model's own log-probabilities, a little off, as those of the sampler.

    With any others phi would be 0, and so would be most of the backward pass: GPUs multiply zeros faster.
    """
    rng = np.random.default_rng(1)
    samples = [
        replace(sample, log_mu=(log_pi + rng.normal(0, 0.5 / len(log_pi) ** 0.5, len(log_pi))).astype(np.float32))
        for sample, log_pi in zip(work.samples, policy.log_probs(work.samples, work.plan), strict=True)
    ]
    return Work(samples, work.plan)


def costs(facts: Architecture, samples: Sequence[Sample]) -> list[float]:
    """FLOPs of a forward pass over each sample, the output layer at response tokens alone."""
    cost, of_logits = sample_cost(facts), 2.0 * facts.config["hidden_size"] * facts.vocab_size
    return [cost(n) - of_logits * (n - len(s.response_ids)) for n, s in zip(fed(samples), samples, strict=True)]


def step(setting: Setting, policy: Policy, work: Work) -> tuple[float, float, float]:
    """One update: seconds of forward and backward passes, of the optimizer, and the gradient's norm."""
    objective = PolicyGradient(
        Weighting(KERNELS["vespo"], VespoParams()), Aggregation("token-mean"), denominators(work.samples)
    )
    _wait(setting)
    start = time.perf_counter()
    policy.forward_backward(work.samples, work.plan, objective)
    _wait(setting)
    between = time.perf_counter()
    result = policy.optim_step()
    _wait(setting)
    if result.skipped:
        raise RuntimeError("the gradient is not finite")
    return between - start, time.perf_counter() - between, result.grad_norm


def _wait(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()


def measure(
    setting: Setting,
    report: Report,
    precision: str = "bf16",
    recipe: str = "blockwise",
    layers: int = 4,
    tokens: int = 32768,
    microbatch: int = 16384,
) -> None:
    """Add a row: with so many layers, or with fewer where memory does not hold them."""
    name = precision if precision == "bf16" else f"FP8 {recipe}, {precision}"
    with report.attempt(name):
        for count in range(1 if setting.tiny else layers, 0, -1):
            try:
                return _measure(setting, report, name, precision, recipe, count, tokens, microbatch)
            except torch.OutOfMemoryError as error:
                print(f"  {count} layers: {str(error).splitlines()[0]}", flush=True)
            free_memory(setting)
        raise RuntimeError("not even one layer fits")


def _measure(
    setting: Setting, report: Report, name: str, precision: str, recipe: str, layers: int, tokens: int, microbatch: int
) -> None:
    facts = models.architecture(setting, layers)
    policy = make_policy(setting, facts, precision, recipe)
    work = nearly_on_policy(policy, make_work(setting, facts, tokens, microbatch))
    print(
        f"  {layers} layers, {work.tokens} tokens in {len(work.samples)} samples, {len(work.plan)} microbatches",
        flush=True,
    )
    found = []
    for number in range(setting.warm_up + min(setting.repeats, 5)):
        found.append(step(setting, policy, work))
        print(
            f"  step {number}: {found[-1][0]:.3f} s, {found[-1][1]:.3f} s, gradient norm {found[-1][2]:.3g}", flush=True
        )
    measured = sorted(found[setting.warm_up :])
    median = measured[len(measured) // 2]
    seconds, peak = median[0] + median[1], peak_flops(setting)
    flops = 3 * sum(costs(facts, work.samples))
    report.add(
        *(name, layers, work.tokens, len(work.plan), 1e3 * median[0], 1e3 * median[1]),
        work.tokens / seconds,
        flops / median[0] / 1e12,
        None if peak is None else flops / seconds / peak,
        torch.cuda.max_memory_allocated() / 2**30 if setting.on_gpu else None,
        median[2],
    )


def new_report(path: str | None = None) -> Report:
    """The empty table."""
    return Report(
        "Training step, Qwen3-30B-A3B's layers, embedding and output layer",
        (
            *("precision", "layers", "tokens", "microbatches", "forward and backward ms", "optimizer ms"),
            *("tokens/s", "TFLOP/s without optimizer", "MFU", "peak GiB", "gradient norm"),
        ),
        "MFU: FLOPs of three forward passes, logits at response tokens alone, over the whole step's time at 989 TFLOP/s"
        " (dense bf16, also for FP8).",
        path=path,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--precision", choices=PRECISIONS, default="bf16")
    options.add_argument("--recipe", choices=models.RECIPES, default="blockwise")
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--tokens", type=int, default=32768)
    options.add_argument("--microbatch", type=int, default=16384)
    parsed = options_of(options, arguments)
    # Packed microbatches differ in length; without this torch keeps a block for each length.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    setting, report = setting_of(parsed), new_report(parsed.out)
    join()
    measure(setting, report, parsed.precision, parsed.recipe, parsed.layers, parsed.tokens, parsed.microbatch)
    return finish(report)


if __name__ == "__main__":
    raise SystemExit(main())
