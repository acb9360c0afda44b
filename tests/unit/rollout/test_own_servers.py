"""Servers of the run's own as processes: how they start, end and start again."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stand_in import make_tree, wait_for

from megatron_vespo.config import Config
from megatron_vespo.config_file import parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.own_servers import Supervisor, make_servers, servers_of_node
from megatron_vespo.rollout.placement import Node
from megatron_vespo.rollout.serve_with_key import KEY_VARIABLE
from megatron_vespo.rollout.server import PORT_STRIDE, SGLangServer


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """While this file is there, no server starts."""
    return tmp_path / "broken"


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    return lambda count, **server: parse_config(make_tree(tmp_path, count, **server))


def seeds(servers: list[SGLangServer]) -> list[str]:
    return [server.command[server.command.index("--random-seed") + 1] for server in servers]


def test_they_start_together_on_ports_of_their_own_and_end_together(make_config: Callable[..., Config]) -> None:
    with servers_of_node(make_config(3), Node()) as own:
        own.wait_ready()
        servers = list(own.here.values())
        assert own.urls == [server.url for server in servers] and len(own.urls) == 3
        ports = sorted(server.port for server in servers)
        assert all(after - before >= PORT_STRIDE for before, after in itertools.pairwise(ports))
        assert seeds(servers) == ["5", "6", "7"]
        assert [server.log_file.name for server in servers] == [f"sglang_0_{k}.log" for k in range(3)]
        pids = [server.pid for server in servers]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_one_server_keeps_the_name_of_its_log(make_config: Callable[..., Config]) -> None:
    (server,) = servers_of_node(make_config(1), Node()).here.values()
    assert server.log_file.parts[-2:] == ("logs", "sglang.log") and seeds([server]) == ["5"]


def test_logs_of_other_nodes_wait_beside_the_runs_folder(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """Rank 0 makes that folder, or empties an earlier run's, while they start."""
    config = make_config(2)
    with servers_of_node(config, Node(number=1, count=2)) as own:
        assert seeds(list(own.here.values())) == ["7", "8"]
        assert not config.run_folder.exists() and len(list((tmp_path / "runs").glob(".r.*"))) == 2
        own.move_logs(config.run_folder / "logs")
        own.wait_ready()
        assert sorted(path.name for path in (tmp_path / "runs").rglob("*.log")) == ["sglang_1_0.log", "sglang_1_1.log"]
        assert not list((tmp_path / "runs").glob(".r.*"))


def test_gpus_ports_and_the_key(make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    monkeypatch.setenv("KEY", "secret")
    config = make_config(2, device="cuda", host="0.0.0.0", port=31000, api_key_env="KEY")
    first, second = servers_of_node(config, Node(number=1, count=2, ranks=4, meeting_point="127.0.0.1")).here.values()
    assert first.environment["CUDA_VISIBLE_DEVICES"] == "4,5" and second.environment["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert (first.port, second.port) == (31000, 31000 + PORT_STRIDE)
    assert first.environment[KEY_VARIABLE] == second.environment[KEY_VARIABLE] == "secret"
    assert not any("secret" in word for word in first.command)
    (served,) = make_servers(config, [range(1)], [Path("log")], 0, "10.0.0.7")
    assert served.url == "http://10.0.0.7:31000"


def test_without_gpus_the_variable_is_left_alone(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (server,) = servers_of_node(make_config(1), Node()).here.values()
    assert "CUDA_VISIBLE_DEVICES" not in server.environment


@pytest.fixture
def supervised(make_config: Callable[..., Config]) -> Iterator[tuple[SGLangServer, Supervisor, list[str]]]:
    """A server, who supervises it, and what that one says."""
    said: list[str] = []
    with servers_of_node(make_config(1), Node()) as own:
        own.wait_ready()
        servers = list(own.here.values())
        supervisor = Supervisor(servers, max_restarts=2, proof=1e9, announce=said.append)
        supervisor.start()
        yield servers[0], supervisor, said
        supervisor.close()


def test_one_that_dies_is_started_again(supervised: tuple[SGLangServer, Supervisor, list[str]]) -> None:
    server, supervisor, said = supervised
    for times in (1, 2):
        before = server.pid
        assert before is not None
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: len(said) == 2 * times)  # noqa: B023 - waited for at once
        assert said[-1].endswith("is back") and server.is_alive and server.pid != before
        assert not supervisor.gave_up


def test_one_that_keeps_dying_is_left(supervised: tuple[SGLangServer, Supervisor, list[str]], broken: Path) -> None:
    server, supervisor, said = supervised
    broken.touch()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    wait_for(lambda: supervisor.gave_up)
    assert "died again after 2 restarts (rollout.server.max_restarts)" in said[-1]
    assert "broken on purpose" in said[-1]


def test_one_that_does_not_start_is_told(make_config: Callable[..., Config], broken: Path) -> None:
    broken.touch()
    with servers_of_node(make_config(2), Node()) as own, pytest.raises(UserError, match="broken on purpose"):
        own.wait_ready()
