"""The reference's own parts, each against something else."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vespo import platform
from megatron_vespo.algorithms.aggregation import Denominators
from megatron_vespo.config import AlgorithmSection
from megatron_vespo.config_file import load_config, parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.layouts.outcome import Outcome, read_weights
from megatron_vespo.layouts.reference import Loss, RouterGap, TokenFigures, grad_norm, step
from megatron_vespo.layouts.settings import UPDATE_OVERRIDES, Update, check_comparable
from megatron_vespo.layouts.work import work_arguments
from megatron_vespo.rollout.batches import save_batch
from megatron_vespo.types import Prompt, Sample, SampleGroup
from tests.tiny_models import make_tiny_qwen3_moe
from tests.unit.algorithms.vespo_reference import ReferenceSample, log_weight, loss_and_gradients, phi


def make_tree(folder: Path | str = "x", **sections: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "run": {"name": "x"},
        "model": {"hf_path": str(folder)},
        "megatron": {"lr": 1e-3},
        "data": {"train": "x"},
        "training": {"steps": 1},
    }
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields}
    return tree


# --- the optimizer step ---


def make_parameters() -> list[Tensor]:
    """A matrix, a vector and an expert weight that no token chose, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (6,), (2, 3, 4))
    parameters = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    for parameter in parameters[:2]:
        # Some gradients far below eps, some far above.
        size = 10 ** torch.empty(parameter.shape, dtype=torch.float64).uniform_(-6, 0, generator=generator)
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size
    return parameters


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("clip_grad", [0.0, 0.1, 1e9])
def test_the_step_is_that_of_torch(decoupled: bool, clip_grad: float) -> None:
    ours, theirs = make_parameters(), make_parameters()
    before = [parameter.detach().clone() for parameter in ours]
    update = Update(1e-2, adam_eps=1e-3, weight_decay=0.3, decoupled_weight_decay=decoupled, clip_grad=clip_grad)
    norm = grad_norm(ours)
    largest = step(ours, norm, update)

    if clip_grad:
        assert math.isclose(float(torch.nn.utils.clip_grad_norm_(theirs, clip_grad)), norm, rel_tol=1e-14)
    theirs[2].grad = torch.zeros_like(theirs[2])
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    groups = [
        {"params": [theirs[0], theirs[2]], "weight_decay": update.weight_decay},
        {"params": [theirs[1]], "weight_decay": 0.0},
    ]
    kind(groups, lr=update.lr, betas=(0.7, 0.93), eps=update.adam_eps).step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-15)
    changes = [float((mine.detach() - old).abs().max()) for mine, old in zip(ours, before, strict=True)]
    assert math.isclose(largest, max(changes), rel_tol=1e-12) and min(changes) > 0


def test_the_defaults_are_megatrons() -> None:
    platform.prepare()
    from megatron.core.optimizer import OptimizerConfig

    theirs = OptimizerConfig(lr=1.0)
    ours = Update(lr=1.0)
    for name in Update.__slots__:
        assert getattr(ours, name) == getattr(theirs, name), name


# --- the loss ---


def make_sample(advantage: float, log_mu: list[float]) -> Sample:
    size = len(log_mu)
    response = np.arange(size, dtype=np.int32)
    return Sample(
        Prompt(0, np.zeros(2, np.int32)),
        0,
        response,
        np.array(log_mu, np.float32),
        np.zeros(size, np.int32),
        "stop",
        advantage=advantage,
    )


@pytest.mark.parametrize("advantage", [0.7, -1.3, 0.0])
@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.25])
def test_loss_and_gradient_are_the_formula(advantage: float, shift: float) -> None:
    sample = make_sample(advantage, [-1.5, -0.25, -3.0])
    log_pi = torch.tensor([-1.25 + shift, -0.5, -2.75], dtype=torch.float64, requires_grad=True)
    entropy = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    loss, row = Loss(AlgorithmSection(), Denominators(10, 3))(sample, TokenFigures(log_pi, entropy))
    loss.backward()
    plain = ReferenceSample(log_pi.tolist(), sample.log_mu.tolist(), advantage)
    value, (gradient,) = loss_and_gradients([plain], 10)
    assert log_pi.grad is not None
    assert log_pi.grad.tolist() == pytest.approx(gradient, rel=1e-13)
    assert row == pytest.approx(
        {
            "loss": value,
            "log_w": log_weight(plain),
            "log_drift": log_weight(plain),
            "phi": phi(log_weight(plain), advantage),
            "abs_log_ratio": abs(0.25 + shift) + 0.5,
            "max_abs_log_ratio": max(abs(0.25 + shift), 0.25),
            "entropy": 7.0,
            "kl_ref": 0.0,
            "tokens": 3.0,
        },
        rel=1e-13,
    )


def test_a_sample_of_infinite_weight_adds_nothing() -> None:
    log_pi = torch.tensor([-1.0, -torch.inf], dtype=torch.float64, requires_grad=True)
    loss, row = Loss(AlgorithmSection(), Denominators(1, 1))(
        make_sample(1.0, [-1.0, -1.0]), TokenFigures(log_pi, torch.zeros(2).double())
    )
    loss.backward()
    assert loss.item() == row["phi"] == 0 and row["log_w"] == -math.inf
    assert log_pi.grad is not None and not bool(log_pi.grad.any())


# --- the router ---


def test_the_router_gap_is_the_smallest() -> None:
    class TinyRouter(torch.nn.Module):
        top_k = 2

        def forward(self, logits: Tensor) -> tuple[Tensor, None]:
            return logits, None

    router = TinyRouter()
    gap = RouterGap(torch.nn.Sequential(router))
    probabilities = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.28, 0.22]], dtype=torch.float64)
    router(probabilities.log())
    assert gap.smallest == pytest.approx(0.06)
    router(torch.tensor([[0.3, 0.35, 0.05, 0.3]], dtype=torch.float64).log())
    assert gap.smallest == pytest.approx(0, abs=1e-15)


# --- all of it, as the tool runs it ---


def test_the_process_writes_an_outcome_without_megatron(tmp_path: Path) -> None:
    folder = make_tiny_qwen3_moe(tmp_path / "model", vocab_size=50)
    first = make_sample(0.0, [-4.0, -3.5, -4.5])
    samples = [replace(first, reward=1.0), replace(make_sample(0.0, []), index=1)]
    save_batch(
        tmp_path / "batch.msgpack",
        [SampleGroup(first.prompt, samples)],
        step=1,
        policy_version=3,
        temperature=1.0,
        vocab_size=50,
    )
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(make_tree(folder)))
    arguments = work_arguments(config, tmp_path / "batch.msgpack", tmp_path / "out", UPDATE_OVERRIDES)
    command = [sys.executable, "-m", "megatron_vespo.layouts.reference", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    outcome = Outcome.read(tmp_path / "out")
    assert outcome.table["tokens"] == [3.0, 0.0] and outcome.table["loss"][1] == 0
    assert outcome.metrics["rollout/staleness_max"] == 3
    assert outcome.grad_norm > 0 and 5e-4 < outcome.facts["largest_change"] < 1.1e-3
    after, before = dict(read_weights(tmp_path / "out")), read_single_file(folder)
    assert after.keys() == before.keys()
    assert {value.dtype for value in after.values()} == {np.dtype(np.float64)}
    changes = {name: np.abs(after[name] - before[name]).max() for name in after}
    assert max(changes.values()) == pytest.approx(outcome.facts["largest_change"], rel=1e-9)
    assert min(changes.values()) > 0
    fed = "model.embed_tokens.weight"  # the prompt is of pad tokens: they learn too
    assert np.abs(after[fed][0] - before[fed][0]).max() > 1e-4 > np.abs(after[fed][9] - before[fed][9]).max()


def read_single_file(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


# --- what cannot be compared ---


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("megatron", "bf16", True),
        ("megatron", "fp8", "e4m3"),
        ("megatron", "optimizer", "sgd"),
        ("megatron", "params_dtype", "bfloat16"),
        ("megatron", "moe_aux_loss_coeff", 0.01),
        ("megatron", "moe_aux_loss_coeff", [0.0, 0.01]),
        ("megatron", "moe_z_loss_coeff", 0.01),
        ("megatron", "hidden_dropout", 0.1),
        ("megatron", "decoupled_lr", 0.1),
        ("megatron", "apply_wd_to_qk_layernorm", True),
        ("megatron", "grad_norm_skip_threshold", 10.0),
        ("training", "lr_warmup_steps", 2),
        ("model", "initialize", "random"),
        ("rollout", "behavior_logprobs", "recompute"),
    ],
)
def test_what_the_reference_cannot_honour_is_refused(section: str, key: str, value: object) -> None:
    with pytest.raises(UserError) as error:
        check_comparable(parse_config(make_tree(**{section: {key: value}})))
    assert str(error.value).startswith(f"{section}.{key}")


def test_what_it_can_honour_is_not() -> None:
    harmless = {"moe_aux_loss_coeff": 0.0, "bf16": False, "optimizer": "adam", "use_distributed_optimizer": True}
    check_comparable(parse_config(make_tree(megatron=harmless)))
    with pytest.raises(UserError, match=r"megatron\.lr"):
        check_comparable(parse_config({**make_tree(), "megatron": {}}))
    with pytest.raises(UserError, match="objective=sft"):
        check_comparable(parse_config({**make_tree(), "objective": "sft"}))


def test_the_tools_own_settings_win_over_the_file_only(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(make_tree(megatron={"lr": 1e-6, "clip_grad": 0.25})))
    assert Update.of(load_config(path, UPDATE_OVERRIDES)) == Update(1e-3, adam_eps=1e-3, clip_grad=0.25)
    assert Update.of(load_config(path, [*UPDATE_OVERRIDES, "megatron.lr=0.5"])).lr == 0.5
