"""Asynchronous against synchronous training where response lengths have a long tail; prints ratios of one run.

PYTHONPATH=. .venv/bin/python benchmarks/asynchronous.py [--rounds 2] [--steps 16] [--arms "S=0" "S=1" ...]

A random model of V tokens ends a response with probability 1/V at each token: lengths are geometric, and the longest of
a batch is several times the mean. One real SGLang server serves all arms; each is a fresh run of the real trainer on
one rank, and the arms take turns. The learning rate is so small that lengths stay as they are. Two cores: one for the
server, one for the trainer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.rollout.server import SGLangServer
from tests.tiny_models import make_tiny_qwen3_moe

VOCAB_SIZE, LIMIT, CONTEXT = 96, 900, 1024
BASELINE = "S=0"
ARMS: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "S=1": ("rollout.max_staleness=1",),
    "S=2": ("rollout.max_staleness=2",),
    "S=1, in_place": ("rollout.max_staleness=1", "weight_sync.pause=in_place"),
    "S=1, abort": ("rollout.max_staleness=1", "weight_sync.pause=abort"),
    "S=0, over-sampling": ("rollout.over_sampling=0.25",),
}
# Steps at the start of a run that are not counted: imports and caches are cold.
WARM_UP = 3
Rows = Sequence[Mapping[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="runs of each arm")
    parser.add_argument("--steps", type=int, default=16, help="steps of each run")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_qwen3_moe(
            folder / "model", vocab_size=VOCAB_SIZE, std=0.02, hidden_size=64, max_position_embeddings=CONTEXT
        )
        write_inputs(folder)
        rows: dict[str, list[Mapping[str, float]]] = defaultdict(list)
        with SGLangServer(model, folder / "server.log", args={"context_length": CONTEXT}) as server:
            server.wait_ready()
            for number in range(options.rounds):
                for arm in options.arms:
                    measured = run(folder, f"{number}-{list(ARMS).index(arm)}", server.url, arm, options.steps)
                    rows[arm] += measured
                    print(f"round {number + 1}: {arm}: {rate(measured):.1f} samples/s", flush=True)
        show(rows)


def write_inputs(folder: Path) -> None:
    """Prompts, a reward that differs within groups, and the configuration."""
    rng = random.Random(0)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(8)] for _ in range(256)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": ids}) + "\n" for ids in prompts))
    (folder / "reward.py").write_text("def reward(sample):\n    return float(sample.response_ids[:1].sum() % 2)\n")
    tree = {
        "run": {"name": "x", "folder": str(folder / "runs")},
        "model": {"hf_path": str(folder / "model"), "make_vocab_size_divisible_by": 16},
        "megatron": {"lr": 1e-7},
        "data": {"train": str(folder / "prompts.jsonl")},
        "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8, "max_new_tokens": LIMIT},
        "reward": {"function": f"{folder / 'reward.py'}:reward"},
        "training": {"steps": 1, "minibatches_per_step": 2, "max_tokens_per_microbatch": 4096},
        "logging": {"tensorboard": False},
    }
    (folder / "config.yaml").write_text(json.dumps(tree))


def run(folder: Path, name: str, url: str, arm: str, steps: int) -> Rows:
    """Metrics of the counted steps of one run."""
    command = [sys.executable, "-m", "megatron_vespo.launch", "--ranks", "1", str(folder / "config.yaml")]
    command += [f"run.name={name}", f"rollout.server.url={url}", f"training.steps={steps}", *ARMS[arm]]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{arm}: {done.stderr}")
    return read_metrics(folder / "runs" / name / "metrics.jsonl").values[WARM_UP:]


def rate(rows: Rows) -> float:
    """Samples trained a second."""
    return total(rows, "train/samples") / total(rows, "perf/step_time")


def total(rows: Rows, name: str) -> float:
    return float(np.sum([row.get(name, 0.0) for row in rows]))


def show(rows: Mapping[str, Rows]) -> None:
    """The table."""
    heads = (
        "samples/s",
        "ratio",
        "trainer idle",
        "server idle",
        "sync ms",
        "stale",
        "max",
        "length",
        "longest",
        "restarts",
    )
    print(f"\n{'arm':20}" + "".join(f"{head:>{max(len(head) + 2, 7)}}" for head in heads))
    baseline = rate(rows[BASELINE]) if BASELINE in rows else float("nan")
    for arm, steps in rows.items():
        time = total(steps, "perf/step_time")
        mean = {name: total(steps, name) / len(steps) for name in steps[-1]}
        cells = (
            f"{rate(steps):.1f}",
            f"{rate(steps) / baseline:.2f}",
            f"{total(steps, 'perf/generate_time') / time:.0%}",
            f"{total(steps, 'perf/rollout_idle_time') / time:.0%}",
            f"{1000 * mean['perf/sync_time']:.0f}",
            f"{mean['rollout/staleness_mean']:.1f}",
            f"{max(step['rollout/staleness_max'] for step in steps):.0f}",
            f"{mean['rollout/response_length_mean']:.0f}",
            f"{mean['rollout/response_length_max']:.0f}",
            f"{mean['rollout/restarted_groups']:.1f}",
        )
        widths = (max(len(head) + 2, 7) for head in heads)
        print(f"{arm:20}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    if BASELINE in rows:
        wait = total(rows[BASELINE], "perf/generate_time")
        time = total(rows[BASELINE], "perf/step_time")
        ideal = time / max(wait, time - wait)
        print(
            f"\n{BASELINE}: {wait / time:.0%} generating, {1 - wait / time:.0%} training; hiding one gives {ideal:.2f}."
        )
        print("The rest of a gain is the tail: the server has other requests beside the longest responses of a batch.")


if __name__ == "__main__":
    main()
