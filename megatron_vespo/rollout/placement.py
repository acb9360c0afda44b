"""Which devices of a node its SGLang servers take: arithmetic on the configuration alone. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vespo.config import Config

# SGLang's sizes and their other spellings, which the configuration may use as well.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "tp_size": ("tensor_parallel_size",),
    "pp_size": ("pipeline_parallel_size",),
    "dp_size": ("data_parallel_size",),
    "ep_size": ("expert_parallel_size", "ep"),
}


def server_size(sglang: Mapping[str, Any], name: str) -> int:
    """``tp_size``, ``pp_size``, ``dp_size`` or ``ep_size`` of a ``sglang:`` section, in any spelling; default 1."""
    values = [sglang[spelling] for spelling in (name, *_SPELLINGS[name]) if sglang.get(spelling) is not None]
    return int(values[-1]) if values else 1


def devices_per_server(sglang: Mapping[str, Any]) -> int:
    """Devices of one server with this ``sglang:`` section.

    Replicas (``dp_size``) have devices of their own; with ``enable_dp_attention`` that size splits the attention of one
    replica's tensor-parallel ranks instead, and experts (``ep_size``) are always spread over those ranks.
    """
    replicas = 1 if sglang.get("enable_dp_attention") else server_size(sglang, "dp_size")
    return server_size(sglang, "tp_size") * server_size(sglang, "pp_size") * replicas


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
