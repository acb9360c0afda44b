"""What can be wrong with interfaces, names and addresses: checks of the table in ``checks``."""

from __future__ import annotations

from megatron_vespo.config import Config
from megatron_vespo.environment.facts import Facts, all_loopback


def gloo_interfaces(facts: Facts, config: Config) -> str | None:
    """Whether gloo's list names interfaces of this node; the names are whole."""
    names = facts.setting("GLOO_SOCKET_IFNAME")
    missing = [name for name in names.split(",") if name and name not in facts.interfaces]
    return _no_interface(facts, "GLOO_SOCKET_IFNAME", names) if missing else None


def nccl_interfaces(facts: Facts, config: Config) -> str | None:
    """Whether NCCL's list of prefixes leaves an interface."""
    names = facts.setting("NCCL_SOCKET_IFNAME")
    if not facts.gpus.count or not names or any(_chosen(names, name) for name in facts.interfaces):
        return None
    return _no_interface(facts, "NCCL_SOCKET_IFNAME", names)


def nccl_devices(facts: Facts, config: Config) -> str | None:
    """Whether NCCL's list leaves an InfiniBand or RoCE device."""
    names = facts.setting("NCCL_IB_HCA")
    if not facts.gpus.count or not names or any(_chosen(names, name) for name in facts.infiniband):
        return None
    return f"NCCL_IB_HCA={names} names no device here; there are: {', '.join(facts.infiniband) or 'none'}"


def loopback_interfaces(facts: Facts, config: Config) -> str | None:
    """Whether nodes are to reach each other by the loopback interface."""
    if facts.nodes == 1 or facts.one_machine:
        return None
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if facts.setting(variable).lstrip("=") == "lo":
            return f"{variable}=lo on {facts.nodes} nodes: only processes of this node are reached by it"
    return None


def master(facts: Facts, config: Config) -> str | None:
    """Whether this node finds the one that holds the job's key-value store."""
    name = facts.setting("MASTER_ADDR")
    if facts.nodes == 1 or facts.one_machine:
        return None
    if not facts.master_addresses:
        return f"MASTER_ADDR={name} does not resolve on node {facts.node}"
    # The node with the store may know its own name by a loopback address, as Debian's /etc/hosts has it.
    if all_loopback(facts.master_addresses) and not facts.master_answers:
        return f"MASTER_ADDR={name} is a loopback address on node {facts.node} of {facts.nodes}"
    return None


def own_name(facts: Facts, config: Config) -> str | None:
    """Whether gloo, which listens where the node's name points to, can be reached by other nodes."""
    if facts.nodes == 1 or facts.one_machine or facts.setting("GLOO_SOCKET_IFNAME"):
        return None
    if not all_loopback(facts.own_addresses):
        return None
    addresses = ", ".join(facts.own_addresses) or "no address"
    return f"the name of node {facts.node} resolves to {addresses} there, where gloo would listen"


def _no_interface(facts: Facts, variable: str, names: str) -> str:
    return f"{variable}={names} names no network interface of this node; it has {', '.join(facts.interfaces)}"


def _chosen(setting: str, name: str) -> bool:
    """Whether NCCL's list of prefixes (``=``: of whole names, ``^``: of what is left out) chooses this device."""
    listed = setting.lstrip("^").removeprefix("=")
    exact = setting.lstrip("^").startswith("=")
    names = [part.partition(":")[0] for part in listed.split(",") if part]
    matches = name in names if exact else name.startswith(tuple(names))
    return matches != setting.startswith("^")
