"""FP8 in the trainer's forward pass: the right modules, the right gradient, and no trace in the weights."""

from pathlib import Path

import numpy as np
import torch

from examples.staleness_lab.fake_fp8 import Fp8
from examples.staleness_lab.rollouts import copy_weights
from examples.staleness_lab.trainer_fp8 import Linears, emulate_fp8
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.policy.objectives import NextToken, denominators
from tests.policies import make_plan, make_policy, random_samples
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe


def _train(folder: Path, linears: Linears | None) -> dict[str, object]:
    policy = make_policy(folder, {})
    architecture = load_architecture(folder)
    exporter = HfExporter(policy.chunks, architecture)
    names = [name for name, _ in policy.chunks[0].named_parameters()]
    before = {name: tensor.numpy() for name, tensor in copy_weights(exporter)}
    hooked = emulate_fp8(policy.chunks, Fp8(), linears) if linears else []
    samples = random_samples(6, architecture.vocab_size)
    plan = make_plan(samples, 256)
    log_probs = np.concatenate(policy.log_probs(samples, plan))
    untouched = {name: tensor.numpy() for name, tensor in copy_weights(exporter)}
    policy.forward_backward(samples, plan, NextToken(denominators(samples)))
    gradients = {name: p.main_grad.clone().numpy() for name, p in policy.chunks[0].named_parameters()}
    policy.optim_step()
    assert [name for name, _ in policy.chunks[0].named_parameters()] == names
    assert all("weight" not in module.__dict__ for module in policy.chunks[0].modules())
    assert all(np.array_equal(before[name], untouched[name]) for name in before)
    return {"hooked": hooked, "log_probs": log_probs, "gradients": gradients, "before": before}


def test_forward_is_rounded_and_weights_are_not(tmp_path: Path) -> None:
    folder = make_tiny_qwen3_moe(tmp_path / "model")
    exact, experts, every = (run_ranks(1, _train, folder, linears)[0] for linears in (None, "experts", "all"))
    assert len(experts["hooked"]) == 2 * 4 * 2  # layers, experts, fc1 and fc2
    assert all(".mlp.experts." in name for name in experts["hooked"])
    assert len(every["hooked"]) == 2 * (4 * 2 + 2)
    assert not any("router" in name or "output_layer" in name for name in every["hooked"])
    small, large = (np.abs(run["log_probs"] - exact["log_probs"]).mean() for run in (experts, every))
    assert 1e-4 < small < large < 1
    for run in (experts, every):
        for name, gradient in run["gradients"].items():
            reference = exact["gradients"][name]
            assert np.linalg.norm(gradient - reference) < 0.7 * np.linalg.norm(reference) or not reference.any(), name
        moved = [
            name for name in run["gradients"] if not np.array_equal(run["gradients"][name], exact["gradients"][name])
        ]
        assert any(".mlp.experts." in name for name in moved)


def _linear(folder: Path) -> tuple[np.ndarray, ...]:
    """One expert linear by itself, beside the formula."""
    policy, fp8 = make_policy(folder, {}), Fp8("tensor", "ue8m0")
    emulate_fp8(policy.chunks, fp8, "experts")
    module = policy.chunks[0].get_submodule("decoder.layers.0.mlp.experts.local_experts.1.linear_fc1")
    weight = dict(module.named_parameters())["weight"]
    x = torch.randn(7, weight.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_()
    output, _ = module(x)
    rounded_x, rounded_weight = fp8.activation(x.detach()), fp8.weight(weight.detach())
    wish = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    gradient, weight_gradient = torch.autograd.grad(output, (x, weight), wish)
    return tuple(
        tensor.detach().numpy()
        for tensor in (
            *(output, rounded_x @ rounded_weight.t()),
            *(gradient, wish @ rounded_weight),
            *(weight_gradient, wish.t() @ rounded_x),
        )
    )


def test_one_linear_is_the_formula(tmp_path: Path) -> None:
    folder = make_tiny_qwen3_moe(tmp_path / "model")
    (found,) = run_ranks(1, _linear, folder)
    for ours, formula in zip(found[::2], found[1::2], strict=True):
        np.testing.assert_allclose(ours, formula, rtol=1e-5, atol=1e-6)
