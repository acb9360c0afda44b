"""What a launch would run: every command with its devices and what it changes in the environment. Starts nothing."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence

from megatron_vespo.checks import describe_layout
from megatron_vespo.config import Config
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.own_servers import log_name, servers_of_node
from megatron_vespo.rollout.placement import Node, check_gpus, describe_servers, name_gpus, server_devices
from megatron_vespo.rollout.serve_with_key import KEY_VARIABLE
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.run_folder import resume_step

# Stands for the address of node 0, which nobody knows before the job has its nodes.
MEETING_POINT = "$MASTER_ADDR"
MEETING_PORT = 29500
_INDENT = "    "


def describe_run(
    config: Config, arguments: Sequence[str], ranks: int, nodes: int, environment: Mapping[str, str]
) -> str:
    """All commands of a run in words that a shell understands.

    Args:
        config: Configuration; it has been checked.
        arguments: Those of ``megatron_vespo.train``.
        ranks: Trainer ranks of each node.
        nodes: Nodes.
        environment: What the launcher adds to the ranks' environment, which their servers inherit.

    Raises:
        UserError: No port is free for a server.
    """
    blocks = ["\n".join(_head(config, ranks, nodes))]
    for number in range(nodes):
        node = Node(number, nodes, ranks, MEETING_POINT if nodes > 1 else Node.meeting_point)
        blocks.append("\n".join(_node(config, node, arguments, environment)))
    return "\n\n".join(blocks)


def _head(config: Config, ranks: int, nodes: int) -> Iterator[str]:
    step, folder = resume_step(config), config.run_folder
    replaces = folder.is_dir() and any(folder.iterdir())
    yield f"run folder: {folder}, " + (
        f"goes on after step {step}" if step is not None else "replaces what is there" if replaces else "new"
    )
    if nodes == 1:
        yield "rendezvous: in the launcher, on a free port of 127.0.0.1"
    else:
        yield f"rendezvous: {MEETING_POINT}:{MEETING_PORT}, {MEETING_POINT} being the address of node 0"
    yield f"layout: {describe_layout(config, ranks * nodes)}"
    if not config.samples_from_server:
        yield "servers: none"
        return
    yield f"servers: {describe_servers(config, Node(count=nodes, ranks=ranks))}"
    key = config.rollout.server.api_key_env
    if key is not None and nodes > 1:
        yield f"environment variable {key}: the servers' API key, the same on all nodes"
    if config.rollout.server.is_own:
        try:
            check_gpus(config, Node(ranks=ranks))
        except UserError as error:
            yield f"on this machine it would not start: {error}"


def _node(config: Config, node: Node, arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    where, how = (
        (f"node {node.number}, ", "") if node.count > 1 else ("", "; the launcher does by itself what this does")
    )
    ranks = f"{node.ranks} rank{'s' if node.ranks > 1 else ''}"
    yield f"{where}{ranks}, local rank r on GPU r where there are GPUs{how}:"
    yield _INDENT + _line(environment, _torchrun(node, arguments))
    if not (config.samples_from_server and config.rollout.server.is_own):
        return
    own = servers_of_node(config, node, lambda meeting_point: f"ADDRESS_OF_NODE_{node.number}")
    devices = server_devices(config, node.ranks)
    for k, (server, its) in enumerate(zip(own.here.values(), devices, strict=True)):
        where = "on the CPU" if config.rollout.server.device == "cpu" else name_gpus(its)
        free = "" if config.rollout.server.port else ", a free port that may be another one next time"
        log = config.run_folder / "logs" / log_name(config, node, k)
        yield f"server {k} of local rank 0, {where}, {server.url}{free}, log {log}:"
        yield _INDENT + _server_line(config, server, environment)


def _torchrun(node: Node, arguments: Sequence[str]) -> str:
    if node.count == 1:
        where = "--standalone"
    else:
        where = (
            f'--nnodes {node.count} --node-rank {node.number} --master-addr "{node.meeting_point}"'
            f" --master-port {MEETING_PORT}"
        )
    train = shlex.join(["-m", "megatron_vespo.train", *arguments])
    return f"torchrun {where} --nproc-per-node {node.ranks} {train}"


def _server_line(config: Config, server: SGLangServer, environment: Mapping[str, str]) -> str:
    wanted = {**environment, **server.environment}
    changes = {name: value for name, value in wanted.items() if os.environ.get(name) != value}
    removed = [name for name in os.environ if name not in wanted]
    command = shlex.join(server.command)
    prefix = " ".join(f"-u {name}" for name in removed)
    if KEY_VARIABLE in changes:
        del changes[KEY_VARIABLE]
        source = config.rollout.server.api_key_env
        command = f"{KEY_VARIABLE}={f'${source}' if source else 'A_NEW_KEY'} {command}"
    return " ".join(part for part in ("env", prefix, _line(changes, command)) if part)


def _line(environment: Mapping[str, str], command: str) -> str:
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in sorted(environment.items())), command])
