"""The shipped CPU example runs: its data, its supervised start and its reinforcement learning, shortened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.rollout.batches import RolloutBatch, list_batches, load_batch
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.train import main
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "digits_cpu"


def run(*command: str) -> str:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def launch(config: str, runs: Path, *overrides: str) -> str:
    arguments = ["-m", "megatron_vespo.launch", "--ranks", "2", str(EXAMPLE / config), f"run.folder={runs}"]
    return run(*arguments, *overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the example's data and its supervised start, shortened."""
    folder = tmp_path_factory.mktemp("digits")
    run(str(EXAMPLE / "task.py"), str(folder / "data"))
    overrides = [f"model.hf_path={folder / 'data' / 'model'}", f"data.train={folder / 'data' / 'sft.jsonl'}"]
    launch("sft.yaml", folder, *overrides, "training.steps=30")
    return folder


def rl_overrides(folder: Path) -> list[str]:
    data = folder / "data"
    return [
        f"run.folder={folder}",
        f"model.hf_path={folder / 'demo-sft' / 'hf' / 'latest'}",
        f"data.train={data / 'train.jsonl'}",
        f"data.evaluation={{heldout: {data / 'heldout.jsonl'}}}",
        "training.steps=2",
        "evaluation.max_prompts=16",
    ]


def test_the_digits_example(folder: Path) -> None:
    data = {name: folder / "data" / f"{name}.jsonl" for name in ("sft", "train", "heldout")}
    prompts = {name: {json.loads(line)["prompt"] for line in path.open()} for name, path in data.items()}
    assert not prompts["sft"] & prompts["train"] | prompts["heldout"] & (prompts["sft"] | prompts["train"])

    losses = read_metrics(folder / "demo-sft" / "metrics.jsonl").series("train/loss")[1]
    assert losses[-1] < losses[0] - 0.5

    printed = launch("rl.yaml", folder, *rl_overrides(folder))
    assert "held-out accuracy of heldout:" in printed and "before" in printed
    records = read_metrics(folder / "demo" / "metrics.jsonl")
    assert records.steps == [0, 1, 2]
    # The engines agree in fp32: what log W there is comes from the updates within a step, not from the sampler.
    assert records.values[1]["rollout/staleness_max"] == 3
    assert 0 < records.values[1]["vespo/log_w_abs_mean"] < 1


def reinforce(*overrides: str) -> int:
    os.chdir(ROOT)  # the example names its reward by a relative path
    return main([str(EXAMPLE / "rl.yaml"), *overrides])


def test_every_transport_gives_the_same_run(folder: Path) -> None:
    model = folder / "demo-sft" / "hf" / "latest"
    args = {"enable_deterministic_inference": True, "context_length": 64, "max_total_tokens": 16384}
    runs: dict[str, list[RolloutBatch]] = {}
    with SGLangServer(model, folder / "deterministic.log", args=args) as server:
        server.wait_ready()
        for transport in ("broadcast", "disk", "delta"):
            own = [f"run.name={transport}", f"weight_sync.transport={transport}", "training.steps=3"]
            more = [f"rollout.server.url={server.url}", "rollout.save_batches=true", "data.evaluation={}"]
            assert run_ranks(2, reinforce, *rl_overrides(folder), *own, *more, initialize=False) == [0, 0]
            runs[transport] = [load_batch(path) for path in list_batches(folder / transport / "rollouts")]
    batches = runs.pop("broadcast")
    assert len(batches) == 3 and len({sample.reward for g in batches[0].groups for sample in g.samples}) > 1
    for others in runs.values():
        for ours, theirs in zip(batches, others, strict=True):
            assert_same_samples(ours, theirs)


def assert_same_samples(ours: RolloutBatch, theirs: RolloutBatch) -> None:
    for mine, its in zip(ours.groups, theirs.groups, strict=True):
        assert len({tuple(sample.response_ids) for sample in mine.samples}) > 1, "a group has one seed a sample"
        for one, other in zip(mine.samples, its.samples, strict=True):
            np.testing.assert_array_equal(one.response_ids, other.response_ids)
            np.testing.assert_array_equal(one.log_mu, other.log_mu)
            assert one.reward == other.reward
