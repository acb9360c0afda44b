"""Every check of the table, on facts made up for it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.config import Config
from megatron_vespo.config_file import parse_config
from megatron_vespo.environment.checks import CHECKS, MEGATRON, SGLANG, examine
from megatron_vespo.environment.facts import Facts, ServerEnvironment
from megatron_vespo.gpus import Gpus, visible_gpus

ROOT = Path(__file__).parents[3]
GIB = 1024**3
HOPPER = Gpus(8, "580.65.06", (13, 0), (9, 0))
BLACKWELL = Gpus(8, "580.65.06", (13, 0), (10, 0))
SERVER = ServerEnvironment(python="/opt/sglang/bin/python", sglang=SGLANG, torch_cuda=(13, 0))

# A node of two on which nothing is wrong.
GOOD = Facts(
    ranks=4,
    nodes=2,
    node=1,
    versions={"torch": "2.13.0a0+9186a08", "megatron-core": MEGATRON, "transformer-engine": "2.20.2"},
    torch_cuda=(13, 3),
    gpus=HOPPER,
    server=SERVER,
    environment={
        "MASTER_ADDR": "node-0",
        "NCCL_SOCKET_IFNAME": "eth",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_IB_HCA": "=mlx5_0:1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    },
    interfaces=("lo", "eth0"),
    infiniband=("mlx5_0",),
    shared_memory=(64 * GIB, 60 * GIB),
    open_files=65536,
    locked_memory=None,
    free_disk=1000 * GIB,
    weights=60 * GIB,
    own_addresses=("10.0.0.2",),
    master_addresses=("10.0.0.1",),
)


def make_config(**sections: Any) -> Config:
    tree: dict[str, Any] = {
        "run": {"name": "r"},
        "model": {"hf_path": "m", "layer_spec": "transformer_engine"},
        "megatron": {"tensor_model_parallel_size": 2},
        "data": {"train": "t.jsonl"},
        "training": {"steps": 1},
        "sglang": {"tp_size": 4},
        "rollout": {"server": {"device": "cuda", "python": SERVER.python}},
    }
    return parse_config(tree | sections)


def with_environment(**variables: str) -> Facts:
    return replace(GOOD, environment={**GOOD.environment, **variables})


def without(name: str) -> Facts:
    return replace(GOOD, environment={key: value for key, value in GOOD.environment.items() if key != name})


NO_TE = {key: value for key, value in GOOD.versions.items() if key != "transformer-engine"}
OTHERS = {"rollout": {"server": {"device": "cuda", "url": "http://10.0.0.9:30000"}}}
COLOCATE = {"placement": {"mode": "colocate"}}

# (check, facts on which it speaks, sections of the configuration, what its message says)
WRONG: list[tuple[str, Facts, dict[str, Any], str]] = [
    ("Python", replace(GOOD, python=(3, 11)), {}, "Python 3.11 is too old"),
    ("torch", replace(GOOD, versions={"megatron-core": MEGATRON, "transformer-engine": "2"}), {}, "not installed"),
    ("torch", replace(GOOD, versions={**GOOD.versions, "torch": "2.9.1"}), {}, "torch 2.9.1 is older than 2.10"),
    ("torch's CUDA", replace(GOOD, torch_cuda=None), {}, "was built without CUDA"),
    ("Megatron-Core", replace(GOOD, versions={**GOOD.versions, "megatron-core": "0.18.0"}), {}, "==0.19.2"),
    ("Transformer Engine", replace(GOOD, versions=NO_TE), {}, "model.layer_spec"),
    ("SGLang's environment", replace(GOOD, server=replace(SERVER, sglang=None)), {}, "not installed for /opt/sglang"),
    ("SGLang's environment", replace(GOOD, server=replace(SERVER, error="no such file")), {}, "no such file"),
    ("SGLang's environment", replace(GOOD, server=replace(SERVER, has_package=False)), {}, "cannot import megatron"),
    ("SGLang", replace(GOOD, server=replace(SERVER, sglang="0.5.1")), {}, "SGLang 0.5.1 at /opt/sglang/bin/python"),
    ("driver", replace(GOOD, gpus=replace(HOPPER, cuda=(12, 8))), {}, "580.65.06 runs CUDA 12.8, but torch was built"),
    (
        "driver",
        replace(GOOD, server=replace(SERVER, torch_cuda=(14, 0))),
        {},
        "the servers' torch was built for CUDA 14",
    ),
    ("GPUs", replace(GOOD, gpus=Gpus()), {}, "transformer_engine and rollout.server.device: cuda, but this node shows"),
    ("number of GPUs", replace(GOOD, ranks=5), {}, "needs 9 GPUs, 5 for the trainer's ranks and 4 for"),
    ("number of GPUs", replace(GOOD, ranks=9), COLOCATE, "needs 9 GPUs, 9 for the trainer's ranks and 4 for"),
    ("launch order", with_environment(CUDA_DEVICE_MAX_CONNECTIONS="8"), {}, "CONNECTIONS=8 with megatron.tensor_model"),
    ("allocator", with_environment(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"), COLOCATE, "colocate"),
    ("allocator", with_environment(PYTORCH_ALLOC_CONF="x:1,expandable_segments:true"), COLOCATE, "PYTORCH_ALLOC_CONF"),
    ("gloo's interface", with_environment(GLOO_SOCKET_IFNAME="eth"), {}, "GLOO_SOCKET_IFNAME=eth names no network"),
    ("gloo's interface", with_environment(GLOO_SOCKET_IFNAME="eth0,ib0"), {}, "it has lo, eth0"),
    ("NCCL's interface", with_environment(NCCL_SOCKET_IFNAME="ib,=eth"), {}, "NCCL_SOCKET_IFNAME=ib,=eth names no"),
    ("NCCL's interface", with_environment(NCCL_SOCKET_IFNAME="=eth"), {}, "NCCL_SOCKET_IFNAME==eth names no"),
    ("NCCL's interface", with_environment(NCCL_SOCKET_IFNAME="^eth,lo"), {}, "NCCL_SOCKET_IFNAME=^eth,lo names no"),
    ("NCCL's InfiniBand", with_environment(NCCL_IB_HCA="mlx5_7"), {}, "there are: mlx5_0"),
    ("loopback interface", with_environment(GLOO_SOCKET_IFNAME="lo"), {}, "GLOO_SOCKET_IFNAME=lo on 2 nodes"),
    ("loopback interface", with_environment(NCCL_SOCKET_IFNAME="=lo"), {}, "NCCL_SOCKET_IFNAME=lo on 2 nodes"),
    (
        "MASTER_ADDR",
        replace(GOOD, master_addresses=("127.0.1.1",), master_answers=False),
        {},
        "loopback address on node 1 of 2",
    ),
    ("MASTER_ADDR", replace(GOOD, master_addresses=()), {}, "MASTER_ADDR=node-0 does not resolve on node 1"),
    ("name of the node", replace(without("GLOO_SOCKET_IFNAME"), own_addresses=()), {}, "resolves to no address"),
    ("shared memory", replace(GOOD, shared_memory=(64 * 1024**2, 60 * 1024**2)), {}, "/dev/shm has 64 MiB"),
    ("free shared memory", replace(GOOD, shared_memory=(GIB, GIB // 2)), {}, "/dev/shm has 512 MiB free"),
    ("open files", replace(GOOD, open_files=512), {}, "may open 512 files, and about 768 are needed"),
    ("locked memory", replace(GOOD, locked_memory=8 * 1024**2), {}, "may lock 8 MiB of memory"),
    ("disk", replace(GOOD, free_disk=1024**2), {}, "1 MiB free, too little for logs"),
    (
        "free disk",
        GOOD,
        {"checkpoint": {"interval": 5, "keep": 2}},
        "3 checkpoints and a model folder take about 1,380",
    ),
]

# Facts at which somebody might think something is wrong.
FINE: list[tuple[str, Facts, dict[str, Any]]] = [
    ("nothing special", GOOD, {}),
    ("as many GPUs as there are, shared", replace(GOOD, ranks=8), COLOCATE | {"sglang": {"tp_size": 4, "dp_size": 2}}),
    ("attention's data parallelism", GOOD, {"sglang": {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}}),
    ("a server of others takes none", replace(GOOD, ranks=8, server=None), OTHERS),
    ("connections on Blackwell", replace(with_environment(CUDA_DEVICE_MAX_CONNECTIONS="8"), gpus=BLACKWELL), {}),
    ("connections without tensor parallelism", with_environment(CUDA_DEVICE_MAX_CONNECTIONS="32"), {"megatron": {}}),
    ("a driver of the same major version", replace(GOOD, gpus=replace(HOPPER, cuda=(13, 0))), {}),
    ("expandable segments, own GPUs", with_environment(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"), {}),
    ("an interface left out", with_environment(NCCL_SOCKET_IFNAME="^lo,docker"), {}),
    ("the node with the store", replace(GOOD, master_addresses=("127.0.1.1",)), {}),
    (
        "all on one machine",
        replace(with_environment(GLOO_SOCKET_IFNAME="lo"), one_machine=True, master_addresses=()),
        {},
    ),
    ("its name too", replace(without("GLOO_SOCKET_IFNAME"), one_machine=True, own_addresses=("127.0.0.1",)), {}),
    ("gloo is told where", replace(GOOD, own_addresses=("127.0.1.1",)), {}),
    ("no InfiniBand, no need to lock", replace(without("NCCL_IB_HCA"), infiniband=(), locked_memory=1), {}),
]

# A laptop: no GPU, one node, Docker's shared memory, a small model.
LAPTOP = Facts(
    ranks=2,
    versions={"torch": "2.14.1", "megatron-core": MEGATRON, "sglang": SGLANG},
    torch_cuda=(13, 0),
    server=ServerEnvironment(python="python", sglang=SGLANG, torch_cuda=(13, 0)),
    environment={"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"},
    shared_memory=(64 * 1024**2, 1024**2),
    open_files=1024,
    locked_memory=65536,
    free_disk=GIB,
    weights=1024**2,
)


@pytest.mark.parametrize("check, facts, sections, says", WRONG)
def test_what_is_wrong_is_named_with_a_remedy(check: str, facts: Facts, sections: dict[str, Any], says: str) -> None:
    findings = examine(facts, make_config(**sections))
    assert check in [finding.check for finding in findings]
    [message] = [finding.message for finding in findings if finding.check == check]
    assert says in message
    remedy = next(row.remedy for row in CHECKS if row.name == check)
    assert message.endswith(f"; {remedy}") and len(remedy) > 10


@pytest.mark.parametrize("name, facts, sections", FINE)
def test_what_is_right_is_left_alone(name: str, facts: Facts, sections: dict[str, Any]) -> None:
    assert examine(facts, make_config(**sections)) == []


def test_a_laptop_is_quiet() -> None:
    config = make_config(model={"hf_path": "m"}, rollout={}, megatron={"tensor_model_parallel_size": 2}, sglang={})
    assert examine(LAPTOP, config) == []


def test_every_check_is_tested_and_names_differ() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert set(names) == {name for name, *_ in WRONG}


def test_pins_are_those_of_the_package() -> None:
    setup = (ROOT / "setup.py").read_text()
    assert f'"megatron-core=={MEGATRON}"' in setup and f'"sglang=={SGLANG}"' in setup
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"megatron-core=={MEGATRON}" in constraints and f"sglang=={SGLANG}" in constraints


@pytest.mark.parametrize(
    "visible, count",
    [
        (None, 8),
        ("", 0),
        ("0,1", 2),
        ("1, 3", 2),
        ("0,9,1", 1),
        ("-1", 0),
        ("0,-1,1", 1),
        ("GPU-a,GPU-b", 2),
        ("no", 0),
    ],
)
def test_gpus_are_counted_as_cuda_counts_them(visible: str | None, count: int) -> None:
    assert visible_gpus(8, visible) == count
