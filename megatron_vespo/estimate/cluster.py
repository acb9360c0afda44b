"""Which GPUs of a job train and which serve."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vespo.config import Config
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.placement import devices_per_server


@dataclass(frozen=True, slots=True)
class Cluster:
    """The GPUs of a job.

    Attributes:
        nodes: With trainer ranks.
        gpus_per_node: On each node.
        ranks_per_node: Of these, those that train.
        servers: SGLang servers, all together.
        server_devices: GPUs of them all.
        shared: Whether they are the trainer's.
        server_nodes: Nodes that serve and do not train.
    """

    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    servers: int
    server_devices: int
    shared: bool
    server_nodes: int

    @property
    def ranks(self) -> int:
        """Trainer ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def gpus(self) -> int:
        """GPUs that are used."""
        return self.ranks + (0 if self.shared else self.server_devices)


def make_cluster(config: Config, nodes: int, gpus_per_node: int, server_nodes: int) -> Cluster:
    """Deal the GPUs.

    Args:
        config: Configuration.
        nodes: All nodes of the job, those that only serve included.
        gpus_per_node: GPUs of each.
        server_nodes: Nodes that only serve.

    Raises:
        UserError: There are too few.
    """
    training = nodes - server_nodes
    if training < 1:
        raise UserError(f"--server-nodes {server_nodes} of --nodes {nodes} leave no node to train on")
    each = devices_per_server(config.sglang)
    if not config.samples_from_server:
        return Cluster(training, gpus_per_node, gpus_per_node, 0, 0, False, 0)
    alone = server_nodes * max(gpus_per_node // each, 1)
    if not config.rollout.server.is_own:
        number = alone or max(len(config.rollout.server.urls), 1)
        return Cluster(training, gpus_per_node, gpus_per_node, number, number * each, False, server_nodes)
    per_node = config.placement.servers_per_node
    if config.placement.mode == "colocate":
        if per_node * each > gpus_per_node:
            raise UserError(
                f"placement.servers_per_node={per_node} with {each} devices a server need {per_node * each} of a node's"
                f" {gpus_per_node} GPUs; use {max(gpus_per_node // each, 1)}, or a smaller sglang.tp_size"
            )
        return Cluster(training, gpus_per_node, gpus_per_node, training * per_node, training * per_node * each, True, 0)
    ranks = gpus_per_node - per_node * each
    if ranks < 1:
        raise UserError(
            f"placement.servers_per_node={per_node} with {each} devices a server leave none of a node's {gpus_per_node}"
            " GPUs to train on; use fewer servers, a smaller sglang.tp_size or placement.mode: colocate"
        )
    servers = training * per_node + alone
    return Cluster(training, gpus_per_node, ranks, servers, servers * each, False, server_nodes)
