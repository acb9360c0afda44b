"""Small runs of the whole loop: a configuration for the session's server, and ``train`` on forked ranks."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.train import main
from tests.ranks import run_ranks

DEADLINE = 120.0
REWARDS = Path(__file__).with_name("reward_functions.py")
PROMPTS = [[3, 4, 5], [6, 7], [8], [9, 10, 11, 12, 13]]


def make_tree(server: SGLangServer, folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": ids, "label": "x"}) + "\n" for ids in PROMPTS))
    tree: dict[str, Any] = {
        "run": {"name": "run", "folder": str(folder / "runs")},
        "model": {"hf_path": str(server.model_path), "make_vocab_size_divisible_by": 16},
        "megatron": {"expert_model_parallel_size": 2, "use_distributed_optimizer": True, "lr": 1e-3},
        "data": {"train": str(data), "evaluation": {"held": str(data)}},
        "rollout": {
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "max_new_tokens": 24,
            "temperature": 0.8,
            "server": {"url": server.url},
        },
        "reward": {"function": f"{REWARDS}:of_ids"},
        "training": {"steps": 2, "minibatches_per_step": 2, "max_tokens_per_microbatch": 64},
        "logging": {"tensorboard": True, "rollout_groups": 2},
    }
    for section, fields in changes.items():
        tree[section] = {**tree.get(section, {}), **fields}
    return tree


def run_main(config_file: Path, overrides: list[str]) -> int:
    return main([str(config_file), *overrides])


def write_config(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def run_main_on_ranks(size: int, path: Path, overrides: list[str]) -> list[int]:
    """``train`` in forked ranks; it initialises Megatron itself."""
    return run_ranks(size, run_main, path, overrides, initialize=False)


def wait_for(condition: Callable[[], object], seconds: float = DEADLINE, failure: str = "waited in vain") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.05)


def after_step(metrics: Path, step: int) -> None:
    """Wait until this step is written down."""
    wait_for(lambda: metrics.is_file() and f'"step": {step},' in metrics.read_text(), failure=f"step {step} never came")


def signal_ranks(number: signal.Signals) -> None:
    """Send a signal to the ranks, which are forked from this process."""
    for process in psutil.Process().children():
        if process.cmdline() == psutil.Process().cmdline():
            process.send_signal(number)


def run_and_kill(path: Path, overrides: list[str], metrics: Path, step: int, ranks: int = 2) -> None:
    """A run whose ranks are killed as soon as this step is written down."""

    def kill() -> None:
        after_step(metrics, step)
        signal_ranks(signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(EOFError):
        run_main_on_ranks(ranks, path, overrides)
    thread.join()
