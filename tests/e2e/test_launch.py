"""``launch`` as a user runs it: in a process of its own, its failures at start-up above all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.tiny_models import make_tiny_qwen3_moe


def make_config(folder: Path, **sections: dict[str, Any]) -> Path:
    make_tiny_qwen3_moe(folder / "model")
    (folder / "data.jsonl").write_text(json.dumps({"prompt": [5, 6], "label": "x"}) + "\n")
    tree: dict[str, Any] = {
        "run": {"name": "run", "folder": str(folder / "runs")},
        "model": {"hf_path": str(folder / "model")},
        "megatron": {"lr": 1e-3},
        "data": {"train": str(folder / "data.jsonl")},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 8},
        "training": {"steps": 1},
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(tree))
    return path


def launch(config: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_vespo.launch", "--ranks", str(ranks), str(config), *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2])


def assert_no_process_mentions(text: str) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [p for p in psutil.process_iter(["cmdline"]) if text in " ".join(p.info["cmdline"] or ())]
        left = [p for p in left if p.pid != os.getpid()]
        if not left:
            return
        time.sleep(0.2)
    raise AssertionError(f"processes left over: {left}")


BEFORE_ANY_IMPORT = {
    "missing config file": ([], "not found"),
    "missing checkpoint": (["model.hf_path=/no/such/folder"], "model.hf_path"),
    "layout that does not fit": (["megatron.tensor_model_parallel_size=2"], "does not divide the 1 ranks"),
    "empty data file": ([], "is empty"),
    "run folder that exists": ([], "set run.overwrite=true"),
    "unknown megatron key": (["megatron.tensor_model_paralel_size=2"], "did you mean"),
    "unknown sglang key": (["sglang.max_total_token=2"], "did you mean"),
}


@pytest.mark.parametrize("name", BEFORE_ANY_IMPORT)
def test_bad_input_is_found_before_anything_starts(tmp_path: Path, name: str) -> None:
    overrides, message = BEFORE_ANY_IMPORT[name]
    config = make_config(tmp_path)
    if name == "missing config file":
        config.unlink()
    if name == "empty data file":
        (tmp_path / "data.jsonl").write_text("")
    if name == "run folder that exists":
        (tmp_path / "runs" / "run").mkdir(parents=True)
        (tmp_path / "runs" / "run" / "metrics.jsonl").write_text("precious")
    result = launch(config, *overrides)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.glob("runs/*/*")] in ([], ["metrics.jsonl"])


def test_a_dry_run_prints_the_commands_and_leaves_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = launch(config, "--dry-run", "rollout.server.port=23456", "sglang.max_total_tokens=4096", ranks=2)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "torchrun --standalone --nproc-per-node 2 -m megatron_vespo.train" in result.stdout
    (server,) = [line for line in result.stdout.splitlines() if "-m sglang.launch_server" in line]
    assert "--port 23456" in server and "--max-total-tokens 4096" in server
    assert sorted(tmp_path.rglob("*")) == before
    result = launch(config, "--dry-run", "--nodes", "2", "--ranks", "2", "rollout.server.host=0.0.0.0")
    assert result.returncode == 1 and "error: rollout.server.api_key_env: missing" in result.stderr
    result = launch(config, "--nodes", "2")
    assert result.returncode == 1 and result.stderr.startswith("error: --nodes: ")


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        result = launch(config, f"rollout.server.port={port}")
    assert result.returncode == 1
    assert f"error: port {port} on 127.0.0.1 is taken" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_that_dies_at_start_up_shows_its_log(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    result = launch(config, "sglang.attention_backend=no_such_backend")
    assert result.returncode == 1, result.stderr
    assert "error: the SGLang server" in result.stderr and "no_such_backend" in result.stderr
    assert "sglang.log" in result.stderr and "Traceback" not in result.stderr.split("the end of its log")[0]
    assert_no_process_mentions(str(tmp_path))


def test_killing_the_launcher_leaves_no_process(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    command = [sys.executable, "-m", "megatron_vespo.launch", "--ranks", "1", str(config)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
    log = tmp_path / "runs" / "run" / "logs" / "sglang.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    process.wait(timeout=60)
    assert_no_process_mentions(str(tmp_path))
