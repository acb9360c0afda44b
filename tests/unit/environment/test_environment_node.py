"""Facts of this very machine, and what becomes of findings."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from examples.digits_cpu.task import write_model
from megatron_vespo import environment
from megatron_vespo.config import Config
from megatron_vespo.config_file import parse_config
from megatron_vespo.environment.checks import MEGATRON, SGLANG, Finding
from megatron_vespo.environment.facts import read_facts
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.placement import Node

TWO_NODES = Node(number=1, count=2)
ROOT = Path(__file__).parents[3]


def make_config(folder: Path, **server: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "r", "folder": str(folder / "not" / "yet")},
            "model": {"hf_path": str(folder)},
            "data": {"train": "t.jsonl"},
            "training": {"steps": 1},
            "rollout": {"server": server},
        }
    )


def test_facts_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"12345")
    facts = read_facts(make_config(tmp_path), Node(ranks=2))
    assert facts.ranks == 2 and facts.python == sys.version_info[:2]
    assert facts.versions["megatron-core"] == MEGATRON and "torch" in facts.versions
    assert facts.server is not None and facts.server.sglang == SGLANG and facts.server.python == sys.executable
    assert "lo" in facts.interfaces and facts.weights == 5 and facts.free_disk > 0
    assert facts.own_addresses == () and facts.master_addresses == ()


def test_names_are_resolved_for_several_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert read_facts(make_config(tmp_path), TWO_NODES).master_addresses == ("127.0.0.1",)
    monkeypatch.setenv("MASTER_ADDR", "no such name")
    assert read_facts(make_config(tmp_path), TWO_NODES).master_addresses == ()


def test_agents_on_one_machine_are_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as store:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.getsockname()[1]))
        assert read_facts(config, TWO_NODES).one_machine and not read_facts(config, Node()).one_machine
        monkeypatch.setenv("MASTER_ADDR", socket.gethostname())
        assert not read_facts(config, TWO_NODES).one_machine
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert not read_facts(config, TWO_NODES).one_machine, "nobody answers: the store is on another machine"


def test_the_servers_interpreter_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    server = read_facts(make_config(tmp_path, python=sys.executable), Node()).server
    assert server is not None and server.error is None
    assert server.sglang == SGLANG and server.has_package and server.torch_cuda is not None
    # The interpreter below the environment, which has neither.
    bare = Path(os.path.realpath(sys.executable))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(tmp_path)
    server = read_facts(make_config(tmp_path, python=str(bare)), Node()).server
    assert server is not None and server.error is None and server.sglang is None and not server.has_package


@pytest.mark.parametrize("python, says", [("/no/such/python", "No such file"), ("/bin/false", "it failed")])
def test_an_interpreter_that_does_not_run_is_told(tmp_path: Path, python: str, says: str) -> None:
    server = read_facts(make_config(tmp_path, python=python), Node()).server
    assert server is not None and says in (server.error or "")


def test_checking_imports_no_torch() -> None:
    code = "import sys, megatron_vespo.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_errors_come_together_and_warnings_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("a", "error", "one"), Finding("b", "warning", "look"), Finding("c", "error", "two")]
    monkeypatch.setattr(environment, "examine", lambda facts, config: findings)
    with pytest.raises(UserError, match=r"^one\n  two$"):
        environment.check_before_ranks(make_config(tmp_path), 1)
    assert capsys.readouterr().err == "warning: look\n"
    monkeypatch.setattr(environment, "examine", lambda facts, config: findings[1:2])
    monkeypatch.delenv("MEGATRON_VESPO_NODE_CHECKED", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert environment.check_node(make_config(tmp_path)) == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert environment.check_node(make_config(tmp_path)) == ["look"]
    monkeypatch.setenv("MEGATRON_VESPO_NODE_CHECKED", "")  # so that it is taken back after this test
    environment.check_before_ranks(make_config(tmp_path), 1)
    assert environment.check_node(make_config(tmp_path)) == [], "the launcher has told already"


def test_the_tool_prints_a_table_and_an_exit_status(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "run: {name: r}\nmodel: {hf_path: m}\ndata: {train: t}\ntraining: {steps: 1}\n", encoding="utf-8"
    )
    command = [sys.executable, ROOT / "tools" / "check_environment.py", tmp_path / "c.yaml", "--ranks", "2"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "NCCL_SOCKET_IFNAME": "no"}
    result = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert result.returncode == 0 and "Megatron-Core           ok" in result.stdout, result.stdout + result.stderr
    result = subprocess.run(
        [*command, "model.layer_spec=transformer_engine"],
        capture_output=True,
        text=True,
        env=environ | {"GLOO_SOCKET_IFNAME": "no0"},
    )
    assert result.returncode == 1 and "gloo's interface        error: GLOO_SOCKET_IFNAME=no0" in result.stdout


@pytest.mark.parametrize("module", [["megatron_vespo.launch", "--ranks", "2"], ["megatron_vespo.train"]])
def test_a_run_is_refused_before_anything_starts(tmp_path: Path, module: list[str]) -> None:
    write_model(tmp_path)
    (tmp_path / "t.jsonl").write_text('{"text": "1"}\n', encoding="utf-8")
    (tmp_path / "c.yaml").write_text(
        f"objective: sft\nrun: {{name: r, folder: {tmp_path}}}\nmodel: {{hf_path: {tmp_path}, initialize: random}}\n"
        f"data: {{train: {tmp_path}/t.jsonl}}\ntraining: {{steps: 1}}\n",
        encoding="utf-8",
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "no0"}
    command = [sys.executable, "-m", *module, str(tmp_path / "c.yaml")]
    result = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr.startswith("error: GLOO_SOCKET_IFNAME=no0 names no network interface of this node; it has ")
    assert len(result.stderr.splitlines()) == 1, result.stderr
