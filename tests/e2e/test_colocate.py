"""Trainer and servers that share devices in turns: the same run as on devices of their own, whatever happens in it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.server import SGLangServer
from tests.e2e.small_runs import after_step, make_tree, run_and_kill, run_main_on_ranks, write_config
from tests.e2e.test_resume import metrics
from tests.e2e.test_server_faults import kill, processes_of, trained
from tests.weights import assert_bits_equal, read_weights

SGLANG = {"enable_deterministic_inference": True, "context_length": 64, "max_total_tokens": 16384}
OVERRIDES = ["training.steps=3", "evaluation.interval=1", "checkpoint.interval=2", "checkpoint.hf_interval=1"]


@pytest.fixture(scope="module")
def server(sglang_server: SGLangServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """A server on "devices" of its own, whose samples are determined by the requests' seeds."""
    log = tmp_path_factory.mktemp("deterministic") / "server.log"
    with SGLangServer(sglang_server.model_path, log, args=SGLANG) as server:
        server.wait_ready()
        yield server


def configure(server: SGLangServer, folder: Path, ranks: int, *, shared: bool) -> Path:
    """One and the same run; small buckets, so that the two shared buffers are used again and again."""
    folder.mkdir()
    shutil.copytree(server.model_path, folder / "model")
    tree: dict[str, Any] = make_tree(server, folder, model={"hf_path": str(folder / "model")})
    tree["megatron"]["expert_model_parallel_size"] = ranks
    tree["rollout"]["save_batches"] = True
    if shared:
        tree["placement"], tree["sglang"] = {"mode": "colocate"}, SGLANG
        tree["rollout"]["server"] = {"max_restarts": 2}
    return write_config(folder, tree)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_run_is_that_on_devices_of_their_own(
    server: SGLangServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """With pre-flight, evaluation at every step and checkpoints: metrics and weights are the same to the last bit."""
    for name in ("own", "shared"):
        path = configure(server, tmp_path / name, ranks, shared=name == "shared")
        assert run_main_on_ranks(ranks, path, OVERRIDES) == [0] * ranks
    own, shared = (tmp_path / name / "runs" / "run" for name in ("own", "shared"))
    assert metrics(shared) == metrics(own)
    assert_bits_equal(read_weights(shared / "hf" / "latest"), read_weights(own / "hf" / "latest"))
    steps = read_metrics(shared / "metrics.jsonl").values[1:]
    assert all(step["perf/sync_bytes"] > 0 and step["perf/turns_time"] > 0 for step in steps)
    assert json.loads((shared / "preflight.json").read_text()) == json.loads((own / "preflight.json").read_text())
    assert not list(Path("/dev/shm").glob("megatron_vespo_*")), "shared memory is freed"
    assert not (shared / "weights").exists(), "reports of fingerprints are read and gone"


def test_a_killed_run_goes_on_and_its_killed_server_comes_back(server: SGLangServer, tmp_path: Path) -> None:
    """The server is killed while the trainer trains; it is started, pushed again, and the run is the same."""
    straight, broken = (configure(server, tmp_path / name, 2, shared=True) for name in ("straight", "broken"))
    steps = ["training.steps=8", "checkpoint.interval=3", "training.minibatches_per_step=4"]
    assert run_main_on_ranks(2, straight, steps) == [0, 0]
    run = tmp_path / "broken" / "runs" / "run"
    run_and_kill(broken, steps, run / "metrics.jsonl", step=4)

    def kill_server() -> None:
        model = tmp_path / "broken" / "model"
        after_step(run / "metrics.jsonl", 5)
        command = processes_of(model)[0].cmdline()
        with SGLangControl(f"http://127.0.0.1:{command[command.index('--port') + 1]}") as control:
            while control.ready():  # until the turn is the trainer's
                time.sleep(0.01)
        kill(model)

    thread = threading.Thread(target=kill_server)
    thread.start()
    assert run_main_on_ranks(2, broken, [*steps, "--resume", "auto"]) == [0, 0]
    thread.join()
    reference = tmp_path / "straight" / "runs" / "run"
    assert sum(step.get("perf/server_losses", 0.0) for step in read_metrics(run / "metrics.jsonl").values) == 1
    assert trained(tmp_path / "broken") == list(range(8 * 4))
    assert metrics(run) == metrics(reference)
    assert_bits_equal(read_weights(run / "hf" / "latest"), read_weights(reference / "hf" / "latest"))
    assert not processes_of(tmp_path / "broken" / "model")
