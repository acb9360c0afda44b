"""Cells with the real SGLang: their configuration, and their metrics as an outcome."""

import math
from pathlib import Path

import pytest

from examples.staleness_lab.headline import launch_config, outcome_of
from examples.staleness_lab.observe import COLUMNS
from examples.staleness_lab.settings import Cell, Method, Mismatch, Task
from megatron_vespo.errors import UserError
from megatron_vespo.metrics.records import Records


def make_cell(mismatch: Mismatch | None = None, n: int = 4) -> Cell:
    task = Task(sampler="sglang", updates=8, evaluate_every=8)
    algorithm = Method(kernel="gspo", kernel_params={"eps_low": 0.03})
    perturbation = mismatch or Mismatch()
    return Cell(
        method="m", algorithm=algorithm, n=n, mismatch="x", perturbation=perturbation, lr=1e-3, seed=3, task=task
    )


def test_the_run_is_the_cell(tmp_path: Path) -> None:
    config = launch_config(make_cell(), tmp_path / "start", tmp_path)
    assert (config.algorithm.kernel, config.algorithm.kernel_params) == ("gspo", {"eps_low": 0.03})
    assert (config.training.steps, config.training.minibatches_per_step, config.megatron["lr"]) == (2, 4, 1e-3)
    assert config.rollout.prompts_per_step == 4 * 8 and config.run.seed == 3 and config.evaluation.interval == 2
    assert config.sglang["dtype"] == "float32" and config.weight_sync.verify == "checksum"
    assert Path(config.reward.function.split(":")[0]).is_file()
    rounded = launch_config(make_cell(Mismatch(sampler_dtype="bfloat16")), tmp_path / "start", tmp_path)
    assert rounded.sglang["dtype"] == "bfloat16" and rounded.weight_sync.verify == "none"


def test_what_sglang_cannot_do_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mismatch x: of the real SGLang only sampler_dtype"):
        launch_config(make_cell(Mismatch(router_noise=0.1)), tmp_path, tmp_path)


def test_a_steps_values_stand_for_its_updates() -> None:
    step = {
        "vespo/log_w_mean": -0.5,
        "rollout/response_length_mean": 10.0,
        "train/entropy": 0.2,
        "train/grad_norm": 1.5,
    }
    rows = [{"eval/heldout/accuracy": 0.4}, step, step | {"train/entropy": 0.1, "eval/heldout/accuracy": 0.9}]
    outcome = outcome_of(make_cell(), Records([0, 1, 2], rows, [math.nan] * 3, 0), 7.0, "")
    assert set(outcome.history) == set(COLUMNS)
    assert outcome.history["entropy"] == [0.2] * 4 + [0.1] * 4
    assert outcome.history["kl_per_token"] == [0.05] * 8
    assert outcome.history["ess_w"] == [None] * 8 and outcome.mean("ess_w") is None
    assert outcome.accuracy == [(0, 0.4), (8, 0.9)] and outcome.final == 0.9 and not outcome.collapsed
