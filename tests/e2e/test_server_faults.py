"""Servers that are killed or hang in the middle of a run: the run goes on, and no prompt is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.metrics.records import Records, read_metrics
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.rollout.addresses import ask_router
from megatron_vespo.rollout.batches import list_batches, load_batch
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.fleet import Fleet, State
from megatron_vespo.rollout.protocol import UNPUSHED
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.weight_sync.broadcast import BroadcastTransport
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.sync import WeightSync
from tests.e2e.small_runs import DEADLINE, after_step, make_tree, run_main_on_ranks, signal_ranks, write_config
from tests.policies import load_model
from tests.ranks import free_port, run_ranks


def processes_of(model: Path) -> list[psutil.Process]:
    """The server that serves this folder, and all processes below it."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if "sglang.launch_server" in command and str(model) in command and "guard.py" not in " ".join(command):
            return [process, *process.children(recursive=True)]
    return []


def kill(model: Path) -> None:
    """SIGKILL of the main process."""
    processes_of(model)[0].kill()


def stop(model: Path) -> None:
    """SIGSTOP of the scheduler: the server takes requests and answers none."""
    (scheduler,) = [process for process in processes_of(model) if "scheduler" in " ".join(process.cmdline())]
    os.kill(scheduler.pid, signal.SIGSTOP)


def run(tree: dict[str, Any], folder: Path, overrides: list[str], faults: dict[int, Callable[[], None]]) -> Records:
    """The metrics of a run with faults after these steps."""
    run_folder = folder / "runs" / "run"

    def make_faults() -> None:
        for step, fault in faults.items():
            after_step(run_folder / "metrics.jsonl", step)
            time.sleep(0.1)
            fault()

    thread = threading.Thread(target=make_faults)
    thread.start()
    assert run_main_on_ranks(2, write_config(folder, tree), [*overrides, "rollout.save_batches=true"]) == [0, 0]
    thread.join()
    return read_metrics(run_folder / "metrics.jsonl")


def trained(folder: Path) -> list[int]:
    """Indices of the prompts trained on, in order."""
    batches = [load_batch(path) for path in list_batches(folder / "runs" / "run" / "rollouts")]
    return [group.prompt.index for batch in batches for group in batch.groups]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_survives_its_own_server(sglang_server: SGLangServer, tmp_path: Path, staleness: int) -> None:
    """Killed, or hung, it is started again and gets the current weights."""
    model = tmp_path / "model"
    shutil.copytree(sglang_server.model_path, model)
    tree = make_tree(sglang_server, tmp_path, model={"hf_path": str(model)})
    # The request timeout is for a server that is stopped in the middle of a push.
    tree["rollout"] |= {
        "server": {"hang_timeout": 3.0, "max_restarts": 1},
        "max_new_tokens": 200,
        "request_timeout": 20.0,
    }
    tree["sglang"] = {"context_length": 256, "max_total_tokens": 16384}
    overrides = ["training.steps=7", f"rollout.max_staleness={staleness}", "training.max_tokens_per_microbatch=512"]
    faults: dict[int, Callable[[], None]] = {3: lambda: stop(model)} if staleness else {1: lambda: kill(model)}
    records = run(tree, tmp_path, overrides, faults)
    assert records.steps == list(range(8))
    assert sum(step.get("perf/server_losses", 0.0) for step in records.values) == 1
    assert trained(tmp_path) == list(range(7 * 4)), "no prompt is lost or trained on twice"
    bound = (staleness + 1) * 2 - 1
    assert all(step["rollout/staleness_max"] <= bound for step in records.values[1:])
    assert not processes_of(model)


@pytest.fixture(scope="module")
def second_server(sglang_server: SGLangServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """Another server of the same model, from a folder of its own."""
    folder = tmp_path_factory.mktemp("second")
    shutil.copytree(sglang_server.model_path, folder / "model")
    with SGLangServer(folder / "model", folder / "server.log") as server:
        server.wait_ready()
        yield server


def push_to_hanging(urls: list[str], model: Path, hung: int) -> tuple[list[State], list[int]]:
    """States after a push during which a server hangs, and after another once it is well; versions served."""
    fleet = Fleet(lambda: urls, lambda url: (SGLangControl(url, timeout=5.0), SGLangClient(url, vocab_size=64)))
    fleet.meet()
    servers = Servers()
    exporter = HfExporter(load_model(model, {}), load_architecture(model), 2**20)
    sync = WeightSync(exporter, fleet, servers, BroadcastTransport(servers))
    sync.push(1)
    os.kill(hung, signal.SIGSTOP)
    sync.push(2)
    states = [member.state for member in fleet.members]
    os.kill(hung, signal.SIGCONT)
    time.sleep(1.0)
    sync.push(3)
    versions = [member.control.weight_version() for member in fleet.members]
    sync.close()
    fleet.close()
    return states, versions


def test_a_push_leaves_out_a_server_that_hangs(sglang_server: SGLangServer, second_server: SGLangServer) -> None:
    urls = [sglang_server.url, second_server.url]
    (hung,) = [p.pid for p in processes_of(second_server.model_path) if "scheduler" in " ".join(p.cmdline())]
    ((states, versions),) = run_ranks(1, push_to_hanging, urls, sglang_server.model_path, hung)
    assert states == [State.SERVING, State.GONE] and versions == [3, 3]


def test_servers_die_come_back_and_leave(
    sglang_server: SGLangServer, second_server: SGLangServer, tmp_path: Path
) -> None:
    """The run goes on with the one that is left; who comes back gets the weights at the next push."""
    addresses = tmp_path / "servers.txt"
    addresses.write_text(f"{sglang_server.url}  # the first\n\n{second_server.url}\n")
    tree = make_tree(sglang_server, tmp_path)
    tree["rollout"] |= {"server": {"url_file": str(addresses)}, "max_staleness": 1}
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"

    def kill_and_restart() -> None:
        kill(second_server.model_path)
        time.sleep(1.0)
        second_server.restart()
        with SGLangControl(second_server.url) as control:  # it takes part again
            deadline = time.monotonic() + DEADLINE
            while control.info().weight_version == UNPUSHED:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        addresses.write_text(f"{sglang_server.url}\n")
        step = max(read_metrics(metrics).steps)
        after_step(metrics, step + 3)
        kill(second_server.model_path)  # which concerns nobody any more
        after_step(metrics, step + 6)
        signal_ranks(signal.SIGTERM)

    records = run(tree, tmp_path, ["training.steps=1000"], {2: kill_and_restart})
    assert sum(step.get("perf/server_losses", 0.0) for step in records.values) == 1
    indices = trained(tmp_path)
    assert indices == list(range(len(indices))) and len(indices) == 4 * records.steps[-1]
    assert (tmp_path / "runs" / "run" / "checkpoints" / f"iter_{records.steps[-1]:07d}").is_dir()


@pytest.fixture
def router(sglang_server: SGLangServer, tmp_path: Path) -> Iterator[str]:
    """A real sglang-router before the session's server."""
    port, metrics_port = free_port(), free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", sglang_server.url, "--prometheus-host", "127.0.0.1"]
    command += ["--prometheus-port", str(metrics_port)]
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "router.log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                if ask_router(url) == [sglang_server.url]:
                    break
            except UserError:
                pass
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "router.log").read_text()
            time.sleep(0.2)
        yield url
        process.terminate()


def test_requests_go_through_a_router_and_weights_to_its_workers(
    sglang_server: SGLangServer, router: str, tmp_path: Path
) -> None:
    tree = make_tree(sglang_server, tmp_path)
    tree["rollout"]["server"] = {"router": router}
    records = run(tree, tmp_path, ["training.steps=3"], {})
    assert records.steps == [0, 1, 2, 3]
    # The trainer's updates are in what was sampled: within a step log W is of the updates since, not of a lost push.
    assert all(step["rollout/staleness_max"] == 1 and step["vespo/log_w_abs_mean"] < 0.5 for step in records.values[1:])
    with SGLangControl(sglang_server.url) as control:
        assert control.weight_version() == 6


def test_a_server_that_keeps_dying_ends_the_run(
    sglang_server: SGLangServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(sglang_server.model_path, model)
    tree = make_tree(sglang_server, tmp_path, model={"hf_path": str(model)})
    tree["rollout"]["server"] = {"max_restarts": 0}
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    thread = threading.Thread(target=lambda: (after_step(metrics, 1), kill(model)))
    thread.start()
    assert run_main_on_ranks(2, write_config(tmp_path, tree), ["training.steps=1000"]) == [1, 1]
    thread.join()
    error = capfd.readouterr().err
    assert "was lost again (" in error and ") after 0 restarts" in error and "sglang.log" in error
