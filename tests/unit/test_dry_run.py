"""What ``launch --dry-run`` prints, from the objects that a launch uses."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.config import Config
from megatron_vespo.config_file import parse_config
from megatron_vespo.dry_run import describe_run
from megatron_vespo.launch import rank_environment
from megatron_vespo.rollout.placement import Node


def make_config(folder: Path, **sections: Any) -> Config:
    (folder / "config.json").write_text("{}")
    return parse_config(
        {
            "run": {"name": "r", "folder": str(folder / "runs")},
            "model": {"hf_path": str(folder)},
            "data": {"train": "d"},
            "training": {"steps": 1},
            **sections,
        }
    )


def describe(config: Config, ranks: int = 1, nodes: int = 1) -> str:
    environment = rank_environment(config, Node(count=nodes, ranks=ranks))
    return describe_run(config, ["c.yaml", "run.name='a b'"], ranks, nodes, environment)


def command_after(text: str, start: str) -> list[str]:
    """The words of the command that follows the line which starts so."""
    lines = text.splitlines()
    (index,) = [number for number, line in enumerate(lines) if line.startswith(start)]
    return shlex.split(lines[index + 1])


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "GLOO_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")


def test_one_node(tmp_path: Path) -> None:
    text = describe(make_config(tmp_path), ranks=2)
    assert f"run folder: {tmp_path}/runs/r, new\n" in text and "TP1 PP1 EP1 DP2" in text
    ranks = command_after(text, "2 ranks")
    assert ranks[:4] == ["CUDA_DEVICE_MAX_CONNECTIONS=1", "GLOO_SOCKET_IFNAME=lo", "OMP_NUM_THREADS=1", "torchrun"]
    assert ranks[4:] == [
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megatron_vespo.train",
        "c.yaml",
        "run.name='a b'",
    ]
    server = command_after(text, "server 0 of local rank 0, on the CPU, http://127.0.0.1:")
    assert server[:3] == ["env", "-u", "PYTHONDONTWRITEBYTECODE"]
    assert "SGLANG_PLATFORM=megatron_vespo_cpu" in server and "GLOO_SOCKET_IFNAME=lo" in server
    assert "PYTHONUNBUFFERED=1" not in server, "it is so already"
    assert server[server.index("-m") + 1] == "sglang.launch_server"
    assert not (tmp_path / "runs").exists()


def test_several_nodes_and_a_key_that_is_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "s3cret")
    server = {"device": "cuda", "host": "0.0.0.0", "api_key_env": "KEY"}
    placement, sglang = {"servers_per_node": 2}, {"tp_size": 2}
    config = make_config(tmp_path, rollout={"server": server}, placement=placement, sglang=sglang)
    text = describe(config, ranks=4, nodes=2)
    assert "s3cret" not in text and "environment variable KEY: the servers' API key" in text
    for node in (0, 1):
        ranks = command_after(text, f"node {node}, 4 ranks")
        assert "GLOO_SOCKET_IFNAME=lo" not in ranks
        where = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "$MASTER_ADDR", "--master-port", "29500"]
        assert ranks[ranks.index("torchrun") + 1 :][:8] == where
    lines = [line for line in text.splitlines() if "CUDA_VISIBLE_DEVICES=6,7" in line]
    assert len(lines) == 2 and all("MEGATRON_VESPO_SERVER_KEY=$KEY" in line for line in lines)
    seeds = [line.split("--random-seed ")[1].split()[0] for line in text.splitlines() if "--random-seed" in line]
    assert seeds == ["1", "2", "3", "4"]


def test_without_servers_of_its_own(tmp_path: Path) -> None:
    text = describe(make_config(tmp_path, rollout={"server": {"url": "http://a:1"}}))
    assert "servers: of others, by rollout.server.url\n" in text and "sglang" not in text
    assert "servers: none" in describe(make_config(tmp_path, objective="sft"))
