"""``torchrun`` on two nodes, which are two agents on this machine: each starts a server of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.rollout.batches import list_batches, load_batch
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.protocol import UNPUSHED, ServerError
from megatron_vespo.rollout.server import free_port
from tests.e2e.small_runs import REWARDS
from tests.e2e.test_launch import assert_no_process_mentions, make_config
from tests.ranks import LOOPBACK

ROOT = Path(__file__).parents[2]
DEADLINE = 240.0


@contextmanager
def torchrun(config: Path, *overrides: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The agents of both nodes, one rank each. They meet at 127.0.0.1, so their servers are reached there, too."""
    port = free_port(LOOPBACK)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    agents = []
    for number in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)]
        command += ["--master-addr", "127.0.0.1", "--master-port", str(port), "--nproc-per-node", "1"]
        command += ["-m", "megatron_vespo.train", str(config), *overrides]
        output = subprocess.PIPE
        agents.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
        )
    try:
        yield agents
    finally:
        for agent in agents:  # whose ranks and servers die with them
            agent.kill()
            agent.wait()


def wait_for(agents: list[subprocess.Popen[str]], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert all(agent.poll() is None for agent in agents), [agent.communicate()[0] for agent in agents]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def server_of(agent: subprocess.Popen[str]) -> psutil.Process:
    """The main process of this node's server."""
    (server,) = [
        process
        for process in psutil.Process(agent.pid).children(recursive=True)
        if "sglang.launch_server" in (command := process.cmdline()) and "guard.py" not in " ".join(command)
    ]
    return server


def holds_pushed_weights(server: SGLangControl) -> bool:
    try:
        return server.info().weight_version != UNPUSHED
    except ServerError:
        return False


def test_each_node_has_a_server_and_starts_it_again(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        megatron={"lr": 1e-3, "use_distributed_optimizer": True},
        model={"hf_path": str(tmp_path / "model"), "make_vocab_size_divisible_by": 16},
        sglang={"context_length": 128, "max_total_tokens": 8192},
        rollout={"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 24, "save_batches": True},
        reward={"function": f"{REWARDS}:of_ids_slowly", "params": {"while_there": str(tmp_path / "starting")}},
        preflight={"enabled": False},
    )
    folder = tmp_path / "runs" / "run"
    metrics = folder / "metrics.jsonl"

    def steps() -> int:
        return max(read_metrics(metrics).steps, default=0) if metrics.is_file() else 0

    with torchrun(config, "training.steps=100000") as agents:
        wait_for(agents, lambda: steps() >= 1)
        victim = server_of(agents[1])
        with SGLangControl(f"http://127.0.0.1:{victim.cmdline()[victim.cmdline().index('--port') + 1]}") as control:
            assert holds_pushed_weights(control), "rank 0 knows the server of the other node"
            (tmp_path / "starting").touch()
            victim.kill()
            victim.wait()
            wait_for(agents, control.ready)
            (tmp_path / "starting").unlink()
            wait_for(agents, lambda: holds_pushed_weights(control))
        done = steps()
        wait_for(agents, lambda: steps() > done)
        for agent in agents:
            agent.send_signal(signal.SIGTERM)
        for agent in agents:
            agent.communicate(timeout=DEADLINE)
    records = read_metrics(metrics)
    assert sum(step.get("perf/server_losses", 0.0) for step in records.values) == 1
    indices = [group.prompt.index for path in list_batches(folder / "rollouts") for group in load_batch(path).groups]
    assert indices == list(range(4 * records.steps[-1])), "no prompt is lost or trained on twice"
    assert list((folder / "checkpoints").glob(f"iter_{records.steps[-1]:07d}"))
    assert sorted(path.name for path in (folder / "logs").glob("sglang*")) == ["sglang_0_0.log", "sglang_1_0.log"]
    log = (folder / "logs" / "rank_1.log").read_text()
    assert "died; starting it again" in log and "is back" in log
    assert_no_process_mentions(str(tmp_path))
