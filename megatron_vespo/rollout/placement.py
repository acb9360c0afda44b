"""Which devices of a node its SGLang servers take, and what can be wrong with that. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from megatron_vespo.config import Config
from megatron_vespo.errors import UserError
from megatron_vespo.gpus import read_gpus
from megatron_vespo.rollout.keys import is_loopback
from megatron_vespo.rollout.server import ANY_ADDRESS, PORT_STRIDE

# SGLang's sizes and their other spellings, which the configuration may use as well.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "tp_size": ("tensor_parallel_size",),
    "pp_size": ("pipeline_parallel_size",),
    "dp_size": ("data_parallel_size",),
    "ep_size": ("expert_parallel_size", "ep"),
}
# Of these each must divide the tensor-parallel size, whose ranks it divides into groups.
_DIVISORS = ("ep_size", "attn_dp_size", "attn_cp_size", "moe_dp_size")


@dataclass(frozen=True)
class Node:
    """This node in the job.

    Attributes:
        number: From 0; rank 0 is on node 0.
        count: Nodes of the job.
        ranks: Trainer ranks of this node; 0 where it only serves.
        meeting_point: Address of node 0, by which the ranks meet.
    """

    number: int = 0
    count: int = 1
    ranks: int = 1
    meeting_point: str = "127.0.0.1"

    @classmethod
    def from_environment(cls) -> Self:
        """As torchrun says it to each rank."""
        known = os.environ
        return cls(
            int(known.get("GROUP_RANK", 0)),
            int(known.get("GROUP_WORLD_SIZE", 1)),
            int(known.get("LOCAL_WORLD_SIZE", known.get("WORLD_SIZE", 1))),
            known.get("MASTER_ADDR", cls.meeting_point),
        )

    @property
    def is_reached_from_others(self) -> bool:
        """Whether there are nodes on other machines. Those that meet at a loopback address are all on one."""
        return self.count > 1 and not is_loopback(self.meeting_point)


def server_size(sglang: Mapping[str, Any], name: str) -> int:
    """One of SGLang's sizes, such as ``tp_size``, in a ``sglang:`` section, in any spelling; default 1."""
    spellings = (name, *_SPELLINGS.get(name, ()))
    values = [sglang[spelling] for spelling in spellings if sglang.get(spelling) is not None]
    return int(values[-1]) if values else 1


def devices_per_server(sglang: Mapping[str, Any]) -> int:
    """Devices of one server with this ``sglang:`` section.

    Replicas (``dp_size``) have devices of their own; with ``enable_dp_attention`` that size splits the attention of one
    replica's tensor-parallel ranks instead, and experts (``ep_size``) are always spread over those ranks.
    """
    return server_size(sglang, "tp_size") * server_size(sglang, "pp_size") * _replicas(sglang)


def server_devices(config: Config, local_world_size: int) -> list[range]:
    """Device numbers of each server that the run starts on a node, in the order of the servers.

    Colocated servers share the first devices with the ranks that train on them: device number and local rank are the
    same number. Others have the devices after the trainer's.

    Args:
        config: Configuration.
        local_world_size: Trainer ranks of the node, one device each; 0 on a node that only serves.
    """
    trains = config.objective != "rollout"
    first = local_world_size if trains and config.placement.mode == "disaggregated" else 0
    size = devices_per_server(config.sglang)
    return [range(first + k * size, first + (k + 1) * size) for k in range(config.placement.servers_per_node)]


def check_placement(config: Config, node: Node) -> None:
    """Check what can be known of the servers that this node shall start, before anything is started.

    Raises:
        UserError: The first thing that is wrong, naming the field.
    """
    _check_sizes(config)
    _check_reach(config, node)
    server, count = config.rollout.server, config.placement.servers_per_node
    if server.port is not None and server.port + PORT_STRIDE * (count - 1) > 65535:
        raise UserError(
            f"rollout.server.port={server.port}: each of the {count} servers of a node takes the port"
            f" {PORT_STRIDE} after the one before, and the last goes to 65535; choose a lower one"
        )
    if config.placement.mode == "colocate" and node.ranks:
        needed = server_devices(config, node.ranks)[-1].stop
        if needed > node.ranks:
            raise UserError(
                f"placement.mode=colocate: {_servers(config)} need {needed} devices, and this node has"
                f" {node.ranks} trainer ranks to share them with; lower placement.servers_per_node or the sizes of a"
                " server (sglang.tp_size, pp_size, dp_size), or start more ranks"
            )


def missing_gpus(config: Config, ranks: int, there: int) -> str | None:
    """What a node lacks, in words; None where its GPUs are enough for its ranks and servers.

    Args:
        config: Configuration.
        ranks: Trainer ranks of the node.
        there: GPUs that its processes see.
    """
    trains = ranks if config.objective != "rollout" else 0
    serves = config.samples_from_server and config.rollout.server.is_own and config.rollout.server.device == "cuda"
    last = server_devices(config, ranks)[-1].stop if serves else 0
    needed = max(trains, last)
    if needed <= there:
        return None
    shared = config.placement.mode == "colocate" and trains > 0
    parts = [f"{trains} for the trainer's ranks"] if trains else []
    if serves:
        parts.append(f"{last if shared else last - trains} for {_servers(config)}")
    limit = " in CUDA_VISIBLE_DEVICES" if "CUDA_VISIBLE_DEVICES" in os.environ else ""
    return f"placement: this node needs {needed} GPUs, {' and '.join(parts)}, and has {there}{limit}"


FEWER_GPUS = (
    "start fewer ranks, or lower placement.servers_per_node or the sizes of a server (sglang.tp_size, pp_size,"
    " dp_size), or share GPUs (placement.mode: colocate)"
)


def check_gpus(config: Config, node: Node) -> None:
    """Check that this node has the GPUs that its trainer ranks and servers take.

    Raises:
        UserError: It has fewer.
    """
    if config.rollout.server.device != "cuda":
        return
    problem = missing_gpus(config, node.ranks, read_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")).count)
    if problem is not None:
        raise UserError(f"{problem}; {FEWER_GPUS}")


def describe_servers(config: Config, node: Node) -> str:
    """Where the run samples, in words, for console and summary."""
    server = config.rollout.server
    if not server.is_own:
        return f"of others, by rollout.server.{server.named_by}"
    on = " on each node" if node.count > 1 else ""
    words = f"{_servers(config)}{on}"
    if server.device == "cpu":
        return f"{words}, on the CPU"
    shared = ", shared with the trainer" if config.placement.mode == "colocate" else ""
    return f"{words}, {' and '.join(name_gpus(devices) for devices in server_devices(config, node.ranks))}{shared}"


def name_gpus(devices: range) -> str:
    """Devices in words: ``GPU 4``, ``GPUs 4-7``."""
    return f"GPU {devices.start}" if len(devices) == 1 else f"GPUs {devices.start}-{devices.stop - 1}"


def _servers(config: Config) -> str:
    count = config.placement.servers_per_node
    sizes = {name: server_size(config.sglang, f"{name.lower()}_size") for name in ("TP", "PP", "DP", "EP")}
    shown = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1 or name == "TP")
    return f"{count} server{'s' if count > 1 else ''} of {shown}"


def _replicas(sglang: Mapping[str, Any]) -> int:
    return 1 if sglang.get("enable_dp_attention") else server_size(sglang, "dp_size")


def _check_sizes(config: Config) -> None:
    sglang = config.sglang
    tensor = server_size(sglang, "tp_size")
    divisors = (*_DIVISORS, "dp_size") if sglang.get("enable_dp_attention") else _DIVISORS
    for name in divisors:
        if tensor % server_size(sglang, name):
            raise UserError(
                f"sglang.{name}={server_size(sglang, name)} does not divide sglang.tp_size={tensor}, whose ranks it"
                " splits into groups"
            )
    broadcasts = config.weight_sync.transport != "disk" or config.weight_sync.verify != "none"
    if config.objective == "rl" and broadcasts:
        for name, size in {"pp_size": server_size(sglang, "pp_size"), "dp_size": _replicas(sglang)}.items():
            if size > 1:
                raise UserError(
                    f"sglang.{name}={size}: SGLang takes new weights from a trainer on its tensor-parallel ranks alone;"
                    " use sglang.tp_size and ep_size for larger models, placement.servers_per_node for more servers, or"
                    " weight_sync.transport: disk with verify: none"
                )


def _check_reach(config: Config, node: Node) -> None:
    server = config.rollout.server
    if not node.is_reached_from_others:
        return
    if is_loopback(server.host):
        raise UserError(
            f"rollout.server.host={server.host}: rank 0 must reach the servers of all {node.count} nodes; set"
            f" rollout.server.host={ANY_ADDRESS} and rollout.server.api_key_env=NAME, and have the environment variable"
            " NAME hold one key on all nodes"
        )
    if server.api_key_env is None:
        raise UserError(
            f"rollout.server.api_key_env: missing: the servers of {node.count} nodes need one API key; name an"
            " environment variable that holds it on all of them"
        )
