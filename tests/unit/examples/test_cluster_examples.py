"""The Slurm and Kubernetes examples: run with stand-ins for the cluster, and torchrun parses what they start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from megatron_vespo.config import Config
from megatron_vespo.train import all_overrides, make_run_parser

ROOT = Path(__file__).parents[3]
SLURM, KUBERNETES = ROOT / "examples" / "slurm", ROOT / "examples" / "kubernetes"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"

# Starts the command on "nodes" of this machine, as srun does: ends with the first bad exit status.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$LOG/calls"
while [ "$1" != bash ]; do shift; done
pids=()
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" & pids+=($!)
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$LOG/calls"
[ "$1" != show ] || printf 'node-7\\nnode-8\\n'
"""
# Stands in for the interpreter: notes its arguments, and waits to be told to stop if that is asked for.
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, signal, sys
node = os.environ.get("SLURM_NODEID") or os.environ["JOB_COMPLETION_INDEX"]
if os.environ.get("WAITS"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(os.environ["STATUS"])))
pathlib.Path(os.environ["LOG"], f"node_{{node}}.json").write_text(json.dumps(sys.argv[1:]))
if os.environ.get("WAITS"):
    signal.pause()
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a job of two nodes whose commands are written down in ``LOG``."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "trainer": PYTHON}.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)
    submit = tmp_path / "repository"
    submit.mkdir()
    (submit / "examples").symlink_to(ROOT / "examples")
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "IMAGE"))},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path),
        "PYTHON": str(tmp_path / "bin" / "trainer"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node-[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(submit),
    }


def start(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    command = ["bash", str(SLURM / "train.sbatch"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def calls(environment: dict[str, str]) -> list[str]:
    return (Path(environment["LOG"]) / "calls").read_text().splitlines()


def torchrun_arguments(environment: dict[str, str], node: int) -> Any:
    """What torchrun understands of the command of a node."""
    words = json.loads((Path(environment["LOG"]) / f"node_{node}.json").read_text())
    assert words[:2] == ["-m", "torch.distributed.run"]
    return get_args_parser().parse_args(words[2:])


def trained(arguments: Any) -> tuple[str, list[str]]:
    """Configuration and overrides that the trainer would see."""
    assert arguments.module and arguments.training_script == "megatron_vespo.train"
    options = make_run_parser("train", "").parse_intermixed_args(arguments.training_script_args)
    return options.config, all_overrides(options)


def test_slurm_starts_torchrun_on_every_node(cluster: dict[str, str]) -> None:
    process = start(cluster, "c.yaml", "training.steps=7")
    assert process.wait(60) == 0, process.communicate()[0]
    for node in (0, 1):
        arguments = torchrun_arguments(cluster, node)
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.max_restarts) == ("2", "8", 0)
        assert arguments.rdzv_backend == "c10d" and arguments.rdzv_endpoint == "node-7:30211"
        assert arguments.rdzv_id == "4711-0"
        assert arguments.rdzv_conf.split(",")[0] == f"is_host={int(node == 0)}"
        assert trained(arguments) == ("c.yaml", ["training.steps=7", "run.resume=auto"])
    assert not list(Path(cluster["SLURM_SUBMIT_DIR"]).glob(".slurm*"))


def test_slurm_in_a_container_and_in_another_attempt(cluster: dict[str, str]) -> None:
    more = {"IMAGE": "/images/vespo.sqsh", "MOUNTS": "/data:/data", "RANKS_PER_NODE": "4", "SLURM_RESTART_COUNT": "2"}
    process = start(cluster | more, "c.yaml")
    assert process.wait(60) == 0, process.communicate()[0]
    folder = cluster["SLURM_SUBMIT_DIR"]
    step = next(call for call in calls(cluster) if call.startswith("srun"))
    assert "--container-image /images/vespo.sqsh" in step and "--kill-on-bad-exit=1" in step
    assert f"--container-mounts {folder}:{folder},/data:/data" in step
    arguments = torchrun_arguments(cluster, 1)
    assert arguments.nproc_per_node == "4" and arguments.rdzv_id == "4711-2"


@pytest.mark.parametrize("number, status, requeues", [("USR1", 1, True), ("USR1", 0, False), ("TERM", 1, False)])
def test_slurm_passes_a_signal_on_and_requeues(
    cluster: dict[str, str], number: str, status: int, requeues: bool
) -> None:
    process = start(cluster | {"WAITS": "1", "STATUS": str(status)}, "c.yaml")
    deadline = time.monotonic() + 60
    while len(list(Path(cluster["LOG"]).glob("node_*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # its content, and the shell's wait
    process.send_signal(signal.Signals[f"SIG{number}"])
    assert process.wait(60) == status, process.communicate()[0]
    assert sum("--overlap" in call for call in calls(cluster)) == 1
    assert ("scontrol requeue 4711" in calls(cluster)) == requeues


def test_slurm_reports_a_node_that_fails(cluster: dict[str, str]) -> None:
    assert start(cluster | {"STATUS": "3"}, "c.yaml").wait(60) == 3
    assert not any("requeue" in call for call in calls(cluster))
    assert start(cluster).wait(60) == 2


@pytest.mark.parametrize("script", [SLURM / "train.sbatch", SLURM / "node.sh"])
def test_shell_scripts_pass_shellcheck(script: Path) -> None:
    result = subprocess.run([SHELLCHECK, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def manifests() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((KUBERNETES / "job.yaml").read_text(encoding="utf-8"))
    return service, job


def test_kubernetes_objects_fit_each_other() -> None:
    service, job = manifests()
    pod = job["spec"]["template"]
    [container] = pod["spec"]["containers"]
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert job["kind"] == "Job" and service["kind"] == "Service" and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["RANKS_PER_NODE"])
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["spec"]["terminationGracePeriodSeconds"]
    volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory" and "/data" in mounts
    endpoint = f"{job['metadata']['name']}-0.{service['metadata']['name']}:"
    assert f"--rdzv-endpoint {endpoint}" in container["args"][0]


def test_kubernetes_starts_torchrun(cluster: dict[str, str]) -> None:
    [container] = manifests()[1]["spec"]["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
    for node in (0, 1):
        variables = cluster | environment | {"JOB_COMPLETION_INDEX": str(node)}
        subprocess.run([*container["command"], *container["args"]], env=variables, check=True)
        arguments = torchrun_arguments(cluster, node)
        assert (arguments.nnodes, arguments.nproc_per_node) == ("2", "8")
        assert arguments.rdzv_conf.split(",")[0] == f"is_host={int(node == 0)}"
        config, overrides = trained(arguments)
        assert config == "/data/config.yaml" and overrides[-1] == "run.resume=auto"
        key = next(value for value in overrides if value.startswith("rollout.server.api_key_env="))
        secret = next(variable for variable in container["env"] if variable["name"] == key.partition("=")[2])
        assert secret["valueFrom"]["secretKeyRef"] == {"name": "vespo", "key": "api-key"}
        for override in overrides:
            section, *rest = override.partition("=")[0].split(".")
            model: Any = Config.model_fields[section].annotation
            for field in rest:
                model = model.model_fields[field].annotation
