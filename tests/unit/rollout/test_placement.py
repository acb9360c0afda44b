from typing import Any

import pytest

from megatron_vespo.config import Config
from megatron_vespo.config_file import parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.gpus import Gpus, cuda_visible_devices, visible_gpus
from megatron_vespo.rollout import placement
from megatron_vespo.rollout.placement import (
    Node,
    check_gpus,
    check_placement,
    describe_servers,
    devices_per_server,
    server_devices,
)

NODES = Node(number=1, count=2, ranks=4, meeting_point="10.0.0.1")


def make_config(**sections: Any) -> Config:
    tree = {"run": {"name": "r"}, "model": {"hf_path": "m"}, "data": {"train": "d"}, "training": {"steps": 1}}
    return parse_config({**tree, **sections})


def on_server(**fields: Any) -> dict[str, Any]:
    return {"rollout": {"server": fields}}


@pytest.mark.parametrize(
    "sglang, devices",
    [
        ({}, 1),
        ({"tp_size": 4}, 4),
        ({"tensor_parallel_size": 4, "pipeline_parallel_size": 2}, 8),
        ({"tp_size": 2, "dp_size": 3}, 6),
        ({"tp_size": 4, "dp_size": 4, "enable_dp_attention": True}, 4),
        ({"tp_size": 4, "ep_size": 4}, 4),
        ({"tp_size": 4, "dp_size": 2, "enable_dp_attention": False}, 8),
    ],
)
def test_devices_of_one_server(sglang: dict[str, Any], devices: int) -> None:
    assert devices_per_server(sglang) == devices


def test_disaggregated_servers_come_after_the_trainers_ranks() -> None:
    config = make_config(sglang={"tp_size": 2}, placement={"servers_per_node": 2})
    assert server_devices(config, 4) == [range(4, 6), range(6, 8)]
    assert server_devices(config, 0) == [range(0, 2), range(2, 4)]


def test_colocated_servers_share_the_first_devices() -> None:
    placement = {"mode": "colocate", "servers_per_node": 2}
    assert server_devices(make_config(sglang={"tp_size": 2}, placement=placement), 4) == [range(0, 2), range(2, 4)]


def test_without_a_trainer_the_devices_begin_at_0() -> None:
    config = make_config(objective="rollout", placement={"servers_per_node": 2})
    assert server_devices(config, 1) == [range(0, 1), range(1, 2)]


REFUSED: dict[str, tuple[dict[str, Any], Node, str]] = {
    "experts that do not divide": (
        {"sglang": {"tp_size": 4, "ep": 3}},
        Node(),
        "sglang.ep_size=3 does not divide sglang.tp_size=4",
    ),
    "attention groups that do not divide": (
        {"sglang": {"tp_size": 4, "dp_size": 8, "enable_dp_attention": True}},
        Node(),
        "sglang.dp_size=8 does not divide",
    ),
    "replicas": ({"sglang": {"dp_size": 2}}, Node(), "sglang.dp_size=2: SGLang takes new weights"),
    "pipeline": ({"sglang": {"pp_size": 2}}, Node(), "placement.servers_per_node"),
    "servers larger than the node": (
        {"sglang": {"tp_size": 8}, "placement": {"mode": "colocate"}},
        Node(ranks=4),
        "1 server of TP8 need 8 devices, and this node has 4 trainer ranks",
    ),
    "more servers than ranks": (
        {"placement": {"mode": "colocate", "servers_per_node": 3}},
        Node(ranks=2),
        "lower placement.servers_per_node",
    ),
    "ports beyond the last": (
        {"placement": {"servers_per_node": 2}, **on_server(port=65530)},
        Node(),
        "rollout.server.port=65530",
    ),
    "several nodes on loopback": ({}, NODES, "rollout.server.host=0.0.0.0 and rollout.server.api_key_env=NAME"),
    "several nodes without a common key": (on_server(host="0.0.0.0"), NODES, "rollout.server.api_key_env: missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_placed_is_named(name: str) -> None:
    sections, node, message = REFUSED[name]
    with pytest.raises(UserError) as caught:
        check_placement(make_config(**sections), node)
    assert message in str(caught.value)


def test_what_can_be_placed_passes() -> None:
    check_placement(make_config(), Node())
    attention = {"tp_size": 8, "ep_size": 8, "dp_size": 8, "enable_dp_attention": True}
    check_placement(make_config(sglang=attention), Node())
    colocated = {"mode": "colocate", "servers_per_node": 2}
    check_placement(make_config(sglang={"tp_size": 4}, placement=colocated), Node(ranks=8))
    disk = {"transport": "disk", "verify": "none"}
    check_placement(make_config(sglang={"dp_size": 2}, weight_sync=disk), Node())
    check_placement(make_config(objective="rollout", sglang={"pp_size": 2}), Node())
    check_placement(make_config(**on_server(host="0.0.0.0", api_key_env="KEY")), NODES)
    # Nodes that meet on this machine are on this machine.
    check_placement(make_config(), Node(count=2))


def test_the_node_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert Node.from_environment() == NODES


def test_too_few_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(placement, "read_gpus", lambda visible: Gpus(visible_gpus(8, visible)))
    config = make_config(sglang={"tp_size": 2}, placement={"servers_per_node": 2}, **on_server(device="cuda"))
    check_gpus(config, Node(ranks=4))
    with pytest.raises(UserError) as caught:
        check_gpus(config, Node(ranks=5))
    assert "needs 9 GPUs, 5 for the trainer's ranks and 4 for 2 servers of TP2, and has 8;" in str(caught.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5")
    with pytest.raises(UserError, match=r"needs 8 GPUs.* and has 6 in CUDA_VISIBLE_DEVICES"):
        check_gpus(config, Node(ranks=4))
    check_gpus(config.model_copy(update={"rollout": make_config().rollout}), Node(ranks=99))


def test_devices_count_as_cuda_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cuda_visible_devices(range(2, 4)) == "2,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, GPU-a,5 ,4")
    assert cuda_visible_devices(range(1, 3)) == "GPU-a,5"


def test_the_placement_in_words() -> None:
    assert describe_servers(make_config(), Node()) == "1 server of TP1, on the CPU"
    assert describe_servers(make_config(**on_server(url_file="f")), Node()) == "of others, by rollout.server.url_file"
    sections = {"sglang": {"tp_size": 2, "ep_size": 2}, "placement": {"servers_per_node": 2}}
    config = make_config(**sections, **on_server(device="cuda"))
    assert describe_servers(config, NODES) == "2 servers of TP2 EP2 on each node, GPUs 4-5 and GPUs 6-7"
    config = make_config(placement={"mode": "colocate"}, **on_server(device="cuda"))
    assert describe_servers(config, Node()) == "1 server of TP1, GPU 0, shared with the trainer"
