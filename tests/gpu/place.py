"""Where the GPU tests run, in which precisions, and the model and samples that they share.

On a GPU the tests' functions run in one process that holds it (:mod:`worker`). In a rehearsal each runs in a process of
its own on the CPU, with the local spec and FP8 emulated, so that it can go wrong before there is a GPU to run it on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.samples import make_samples
from examples.staleness_lab.fake_fp8 import Fp8
from examples.staleness_lab.trainer_fp8 import Linears, emulate_fp8
from megatron_vespo.algorithms.loss import Aggregation
from megatron_vespo.algorithms.methods import KERNELS
from megatron_vespo.algorithms.vespo import VespoParams
from megatron_vespo.algorithms.weights import Weighting
from megatron_vespo.models.build import build_model, ddp_config, optimizer_config, transformer_config
from megatron_vespo.models.conversion import load_hf_weights
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.models.precision import packed_alignment
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.policy.objectives import PolicyGradient, denominators
from megatron_vespo.policy.policy import Policy
from megatron_vespo.types import FloatArray, Sample
from tests.gpu.worker import Worker
from tests.policies import OPTIMIZER
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

VOCABULARY = 500  # padded to 512, so that padding that leaks into the softmax shows


@dataclass(frozen=True, slots=True)
class Precision:
    """What matrix products are in.

    Attributes:
        megatron: Its options.
        scope: Layers in FP8.
        emulated: What stands for it in a rehearsal.
    """

    megatron: Mapping[str, Any] = field(default_factory=dict)
    scope: Linears = "experts"
    emulated: Fp8 | None = None

    def __str__(self) -> str:
        return f"{self.megatron['fp8_recipe']} {self.scope}" if self.megatron else "bf16"


BF16 = Precision()


def _fp8(recipe: str, form: str, scope: Linears) -> Precision:
    fp8 = Fp8("block", "ue8m0") if recipe == "blockwise" else Fp8("tensor")
    return Precision({"fp8": form, "fp8_recipe": recipe}, scope, fp8)


FP8 = [
    _fp8(recipe, form, scope)
    for recipe, form in (("blockwise", "e4m3"), ("tensorwise", "hybrid"), ("delayed", "hybrid"))
    for scope in ("experts", "all")
]


_WORKERS: list[Worker] = []
"""The one that runs, or none."""


@dataclass(frozen=True, slots=True)
class Place:
    """A GPU, or the CPU in a rehearsal.

    Attributes:
        layer_spec: Of the models.
        rehearsal: FP8 is emulated.
    """

    layer_spec: str
    rehearsal: bool

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` in a process that is the only rank of a job; both must survive pickling."""
        if self.rehearsal:
            return run_ranks(1, function, *args)[0]
        if not _WORKERS:
            _WORKERS.append(Worker())
        try:
            return _WORKERS[-1].run(function, *args)
        except BaseException:
            _WORKERS.pop().stop()
            raise

    def policy(self, folder: Path, precision: Precision = BF16, **megatron: Any) -> Policy:
        """A policy with the folder's weights, in that process."""
        section = OPTIMIZER | {"bf16": True, "use_distributed_optimizer": True} | megatron
        section |= {} if self.rehearsal else precision.megatron
        architecture = load_architecture(folder)
        config = transformer_config(architecture, section, self.layer_spec, precision.scope)
        chunks = build_model(architecture, config, layer_spec=self.layer_spec, make_vocab_size_divisible_by=16)
        load_hf_weights(chunks, architecture, HfReader(folder))
        if self.rehearsal and precision.emulated is not None:
            emulate_fp8(chunks, precision.emulated, precision.scope)
        return Policy(
            chunks,
            ddp_config=ddp_config(section),
            optimizer_config=optimizer_config(section),
            total_steps=10,
            warmup_steps=0,
            decay_style="constant",
            vocab_size=architecture.vocab_size,
            temperature=1.0,
            alignment=packed_alignment(config),
        )


def make_model(folder: Path, chosen: int = 4) -> Path:
    """A tiny Qwen3-MoE of sizes that GPUs can multiply: multiples of 128, and heads of 64 for cuDNN's attention.

    Args:
        folder: New.
        chosen: Experts that work on a token, of four. With all of them no rounding makes a router choose another, after
            which a token's results have nothing to do with each other: tolerances can be small.
    """
    return make_tiny_qwen3_moe(
        folder,
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        num_experts=4,
        num_experts_per_tok=chosen,
        moe_intermediate_size=128,
        std=0.06,
    )


def samples() -> list[Sample]:
    """Twelve of many lengths, 3 to 200 tokens."""
    return make_samples(12, 200, VOCABULARY)


def nearly_on_policy(some: list[Sample], log_pi: list[FloatArray]) -> list[Sample]:
    """The samples with log mu near these log-probabilities, so that W is near 1 and phi matters."""
    rng = np.random.default_rng(1)
    return [
        replace(sample, log_mu=(values + rng.normal(0, 0.5 / len(values) ** 0.5, len(values))).astype(np.float32))
        for sample, values in zip(some, log_pi, strict=True)
    ]


def vespo(some: list[Sample]) -> PolicyGradient:
    """The VESPO loss of these samples."""
    return PolicyGradient(Weighting(KERNELS["vespo"], VespoParams()), Aggregation("token-mean"), denominators(some))
