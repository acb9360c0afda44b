"""Matrix products of one MoE layer's experts, in bfloat16 and in FP8: time, FLOP/s, and error against bfloat16.

python -m benchmarks.gpu.experts [--tokens 8192]

The experts of one layer of Qwen3-30B-A3B: 128 of them, hidden 2048, inner 768, 8 for each token, with a router that
prefers some experts over others. Weights are cast to FP8 once in a step, in its first microbatch; "first microbatch"
counts that, the others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.measure import Setting, free_memory, milliseconds, peak_flops
from benchmarks.gpu.report import Report
from benchmarks.gpu.script import run


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the dispatcher hands to the experts: x and dy [tokens x 8, H], sizes [experts], probs [tokens x 8]."""

    x: Tensor
    sizes: Tensor
    probs: Tensor
    dy: Tensor


def make_inputs(setting: Setting, facts: dict[str, Any], tokens: int) -> Inputs:
    """Random ones, the same each time."""
    generator = torch.Generator().manual_seed(0)
    rows, experts = tokens * facts["moe_router_topk"], facts["num_moe_experts"]
    preference = (0.5 * torch.randn(experts, generator=generator)).softmax(0)
    sizes = torch.bincount(torch.multinomial(preference, rows, True, generator=generator), minlength=experts)
    on = torch.Generator(setting.device).manual_seed(0)
    shape = (rows, facts["hidden_size"])
    x = torch.randn(shape, device=setting.device, generator=on).bfloat16()
    dy = (torch.randn(shape, device=setting.device, generator=on) * 1e-3).bfloat16()
    # Megatron's dispatcher gives the sizes on the host.
    return Inputs(x, sizes, torch.rand(rows, device=setting.device, generator=on) / 4, dy)


class Experts:
    """The experts of a layer in one precision."""

    def __init__(self, setting: Setting, recipe: str | None) -> None:
        self.config, (chunk,) = models.model(
            setting,
            models.architecture(setting, layers=1, vocab_size=640),
            # With apex it would add to gradient buffers, which there are none of here.
            models.fp8_section(recipe) | {"gradient_accumulation_fusion": False},
        )
        self.module: Any = chunk.get_submodule("decoder.layers.0.mlp.experts")
        self.recipe = recipe

    def precision(self) -> AbstractContextManager[None]:
        """As the transformer block sets it for a layer."""
        if self.recipe is None:
            return nullcontext()
        from megatron.core.fp8_utils import get_fp8_context

        return get_fp8_context(self.config, 0)

    def forward(self, inputs: Inputs, *, first: bool) -> tuple[Tensor, Tensor]:
        """Input, and output [tokens x 8, H]."""
        x = inputs.x.detach().requires_grad_()
        if first:
            self.module.set_is_first_microbatch()
        with self.precision():
            output, _ = self.module(x, inputs.sizes, inputs.probs)
        return x, output

    def both(self, inputs: Inputs, *, first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and gradients of the input and of the first weights, flat."""
        for parameter in self.module.parameters():
            parameter.grad = None
        x, output = self.forward(inputs, first=first)
        output.backward(inputs.dy)
        assert x.grad is not None
        weights = [
            p.grad.flatten() for name, p in self.module.named_parameters() if "fc1" in name and p.grad is not None
        ]
        return output.detach(), x.grad, torch.cat(weights)


def measure(setting: Setting, report: Report, tokens: int = 8192) -> None:
    """Fill the report; the first row is what the others are compared with."""
    facts = models.architecture(setting, layers=1).transformer_config()
    inputs = make_inputs(setting, facts, 64 if setting.tiny else tokens)
    flops = 2.0 * len(inputs.x) * 3 * facts["hidden_size"] * facts["moe_ffn_hidden_size"]
    weights: dict[str, Tensor] = {}
    reference: tuple[Tensor, ...] = ()
    for recipe in (None, *(models.RECIPES if setting.on_gpu else ())):
        with report.attempt(recipe or "bf16"):
            experts = Experts(setting, recipe)
            parameters = dict(experts.module.named_parameters())
            weights = weights or {name: value.detach().clone() for name, value in parameters.items()}
            with torch.no_grad():
                for name, value in parameters.items():
                    value.copy_(weights[name])
            times = milliseconds(setting, ways(experts, inputs))
            found = experts.both(inputs, first=True)
            reference = reference or tuple(value.clone() for value in found)
            errors = [relative_error(ours, wanted) for ours, wanted in zip(found, reference, strict=True)]
            both, peak = times["both"], peak_flops(setting)
            report.add(
                recipe or "bf16",
                times["forward"],
                both - times["forward"],
                times["first"],
                flops / times["forward"] / 1e9,
                3 * flops / both / 1e9,
                None if peak is None else 3e3 * flops / both / peak,
                *errors,
            )
            del experts, parameters, found
        free_memory(setting)


def ways(experts: Experts, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """What is timed."""
    return {
        "first": lambda: experts.both(inputs, first=True),
        "forward": lambda: experts.forward(inputs, first=False),
        "both": lambda: experts.both(inputs, first=False),
    }


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over that of what was wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def new_report(path: str | None = None) -> Report:
    """The empty table."""
    errors = (f"error of {name}" for name in ("output", "input gradient", "weight gradient"))
    return Report(
        "Experts of one layer of Qwen3-30B-A3B, 8,192 tokens x 8",
        (
            *("precision", "forward ms", "backward ms", "both, first microbatch, ms"),
            *("forward TFLOP/s", "both TFLOP/s", "of bf16 peak", *errors),
        ),
        "Errors are norms of differences from bf16 over norms. Peak: 989 TFLOP/s in bf16, FP8 has twice of it.",
        path=path,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    return run(__doc__, arguments, new_report, measure, tokens=8192)


if __name__ == "__main__":
    raise SystemExit(main())
