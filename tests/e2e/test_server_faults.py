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
from megatron_vespo.rollout.server import SGLangServer, free_port
from megatron_vespo.weight_sync.broadcast import BroadcastTransport
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.sync import WeightSync
from tests.e2e.small_runs import (
    DEADLINE,
    REWARDS,
    after_step,
    make_tree,
    run_main_on_ranks,
    signal_ranks,
    wait_for,
    write_config,
)
from tests.policies import load_model
from tests.ranks import LOOPBACK, run_ranks


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


def run_until(tree: dict[str, Any], folder: Path, events: Callable[[], None]) -> Records:
    """The metrics of a run that goes on until these events are over. Nothing here is of the pre-flight."""

    def make_events() -> None:
        try:
            events()
        finally:
            signal_ranks(signal.SIGTERM)

    thread = threading.Thread(target=make_events)
    thread.start()
    overrides = ["training.steps=1000", "rollout.save_batches=true", "preflight.enabled=false"]
    assert run_main_on_ranks(2, write_config(folder, tree), overrides) == [0, 0]
    thread.join()
    return read_metrics(metrics_of(folder))


def metrics_of(folder: Path) -> Path:
    return folder / "runs" / "run" / "metrics.jsonl"


def losses(records: Records) -> float:
    return sum(step.get("perf/server_losses", 0.0) for step in records.values)


def after_loss(metrics: Path) -> int:
    """Wait until a step writes down that a server was lost, perhaps once it was started again; that step."""
    wait_for(lambda: losses(read_metrics(metrics)), 2 * DEADLINE, "no server was lost")
    return read_metrics(metrics).steps[-1]


def trained(folder: Path) -> list[int]:
    """Indices of the prompts trained on, in order."""
    batches = [load_batch(path) for path in list_batches(folder / "runs" / "run" / "rollouts")]
    return [group.prompt.index for batch in batches for group in batch.groups]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_run_survives_its_own_server(sglang_server: SGLangServer, tmp_path: Path, staleness: int) -> None:
    """Killed, or hung, it is started again and gets the current weights.

    Responses are long enough for some to be in flight then.
    """
    model, metrics = tmp_path / "model", metrics_of(tmp_path)
    shutil.copytree(sglang_server.model_path, model)
    tree = make_tree(sglang_server, tmp_path, model={"hf_path": str(model)})
    # The request timeout is for a server that is stopped in the middle of a push.
    tree["rollout"] |= {
        "server": {"hang_timeout": 3.0, "max_restarts": 1},
        "max_new_tokens": 80,
        "request_timeout": 20.0,
        "max_staleness": staleness,
    }
    tree["sglang"] = {"context_length": 128, "max_total_tokens": 16384}
    tree["training"]["max_tokens_per_microbatch"] = 512

    def hit() -> None:
        after_step(metrics, 1 + staleness)
        time.sleep(0.1)  # until requests are in flight, as they mostly are
        (stop if staleness else kill)(model)
        after_step(metrics, after_loss(metrics) + 2)

    records = run_until(tree, tmp_path, hit)
    steps = records.steps[-1]
    assert records.steps == list(range(steps + 1))
    assert losses(records) == 1
    assert trained(tmp_path) == list(range(steps * 4)), "no prompt is lost or trained on twice"
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
    starting, metrics = tmp_path / "starting", metrics_of(tmp_path)
    tree["reward"] = {"function": f"{REWARDS}:of_ids_slowly", "params": {"while_there": str(starting)}}

    def kill_and_restart() -> None:
        after_step(metrics, 2)
        starting.touch()
        kill(second_server.model_path)
        second_server.restart()
        starting.unlink()
        with SGLangControl(second_server.url) as control:  # it takes part again
            deadline = time.monotonic() + DEADLINE
            while control.info().weight_version == UNPUSHED:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        addresses.write_text(f"{sglang_server.url}\n")
        step = max(read_metrics(metrics).steps)
        after_step(metrics, step + 2)  # whose push is the first that leaves it out
        kill(second_server.model_path)  # which concerns nobody any more
        after_step(metrics, step + 4)

    records = run_until(tree, tmp_path, kill_and_restart)
    assert losses(records) == 1
    indices = trained(tmp_path)
    assert indices == list(range(len(indices))) and len(indices) == 4 * records.steps[-1]
    assert (tmp_path / "runs" / "run" / "checkpoints" / f"iter_{records.steps[-1]:07d}").is_dir()


# What `python -m sglang_router.launch_router` does, without its import of all of SGLang for a balancer in Python.
ROUTER = """
import sys
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs
port, metrics_port, worker = sys.argv[1:]
addresses = {"host": "127.0.0.1", "port": int(port), "prometheus_host": "127.0.0.1"}
Router.from_args(RouterArgs(**addresses, prometheus_port=int(metrics_port), worker_urls=[worker])).start()
"""


@pytest.fixture
def router(sglang_server: SGLangServer, tmp_path: Path) -> Iterator[str]:
    """A real sglang-router before the session's server."""
    port, metrics_port = free_port(LOOPBACK), free_port(LOOPBACK)
    command = [sys.executable, "-c", ROUTER, str(port), str(metrics_port), sglang_server.url]
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
        process.kill()  # it would wait for connections to end


def test_requests_go_through_a_router_and_weights_to_its_workers(
    sglang_server: SGLangServer, router: str, tmp_path: Path
) -> None:
    tree = make_tree(sglang_server, tmp_path)
    tree["rollout"]["server"] = {"router": router}
    overrides = ["training.steps=3", "preflight.enabled=false"]
    assert run_main_on_ranks(2, write_config(tmp_path, tree), overrides) == [0, 0]
    records = read_metrics(metrics_of(tmp_path))
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
    metrics = metrics_of(tmp_path)
    thread = threading.Thread(target=lambda: (after_step(metrics, 1), kill(model)))
    thread.start()
    overrides = ["training.steps=1000", "preflight.enabled=false"]
    assert run_main_on_ranks(2, write_config(tmp_path, tree), overrides) == [1, 1]
    thread.join()
    error = capfd.readouterr().err
    assert "was lost again (" in error and ") after 0 restarts" in error and "sglang.log" in error
