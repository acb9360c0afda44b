from typing import Any

import pytest

from megatron_vespo.config import Config
from megatron_vespo.config_file import parse_config
from megatron_vespo.rollout.placement import devices_per_server, server_devices


def make_config(**sections: Any) -> Config:
    tree = {"run": {"name": "r"}, "model": {"hf_path": "m"}, "data": {"train": "d"}, "training": {"steps": 1}}
    return parse_config({**tree, **sections})


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
