"""The shipped CPU example runs: its data, its supervised start and its reinforcement learning, shortened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megatron_vespo.metrics.records import read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "digits_cpu"


def run(*command: str) -> str:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def launch(config: str, runs: Path, *overrides: str) -> str:
    arguments = ["-m", "megatron_vespo.launch", "--ranks", "2", str(EXAMPLE / config), f"run.folder={runs}"]
    return run(*arguments, *overrides)


def test_the_digits_example(tmp_path: Path) -> None:
    run(str(EXAMPLE / "task.py"), str(tmp_path / "data"))
    data = {name: tmp_path / "data" / f"{name}.jsonl" for name in ("sft", "train", "heldout")}
    prompts = {name: {json.loads(line)["prompt"] for line in path.open()} for name, path in data.items()}
    assert not prompts["sft"] & prompts["train"] | prompts["heldout"] & (prompts["sft"] | prompts["train"])

    model = f"model.hf_path={tmp_path / 'data' / 'model'}"
    launch("sft.yaml", tmp_path, model, f"data.train={data['sft']}", "training.steps=30")
    losses = read_metrics(tmp_path / "demo-sft" / "metrics.jsonl").series("train/loss")[1]
    assert losses[-1] < losses[0] - 0.5

    printed = launch(
        "rl.yaml",
        tmp_path,
        f"model.hf_path={tmp_path / 'demo-sft' / 'checkpoints' / 'latest'}",
        f"data.train={data['train']}",
        f"data.evaluation={{heldout: {data['heldout']}}}",
        "training.steps=2",
        "evaluation.max_prompts=16",
    )
    assert "held-out accuracy of heldout:" in printed and "before" in printed
    records = read_metrics(tmp_path / "demo" / "metrics.jsonl")
    assert records.steps == [0, 1, 2]
    # The engines agree in fp32: what log W there is comes from the updates within a step, not from the sampler.
    assert records.values[1]["rollout/staleness_max"] == 3
    assert 0 < records.values[1]["vespo/log_w_abs_mean"] < 1
