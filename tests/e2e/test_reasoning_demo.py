"""The reasoning example runs without data files: tasks made and scored by reasoning_gym, shortened."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "reasoning_cpu"


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=ROOT, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reasoning_example(tmp_path: Path) -> None:
    run("-m", "examples.reasoning_cpu.model", str(EXAMPLE / "rl.yaml"), str(tmp_path / "model"))
    launch = ["-m", "megatron_vespo.launch", "--ranks", "2"]
    sft = [f"run.folder={tmp_path}", f"model.hf_path={tmp_path / 'model'}", "training.steps=60"]
    run(*launch, str(EXAMPLE / "sft.yaml"), *sft)
    start = f"model.hf_path={tmp_path / 'reasoning-sft' / 'hf' / 'latest'}"
    rl = [f"run.folder={tmp_path}", start, "training.steps=2", "evaluation.max_prompts=16", "logging.rollout_groups=32"]
    run(*launch, str(EXAMPLE / "rl.yaml"), *rl)
    folder = tmp_path / "reasoning"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"eval/short/accuracy", "eval/long/accuracy"} <= {name for record in metrics for name in record}
    for file in sorted((folder / "rollouts").glob("step_*.jsonl")):
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        long = Counter(len(sample["label"]) == 5 for sample in samples)
        assert long == {True: 128, False: 128}, "the sources have equal weights, and a prompt eight samples"
        assert not any(sample["reward_error"] for sample in samples)
        for sample in samples:
            right = sample["response"].removesuffix("<eos>").strip() == sample["label"]
            assert (sample["reward"] == 1.0) is right
