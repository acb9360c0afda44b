"""What can only be seen once the ranks have met."""

from __future__ import annotations

import hashlib
import importlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_vespo import parallel
from megatron_vespo.config import Config
from megatron_vespo.config_file import dump_config
from megatron_vespo.environment import warn
from megatron_vespo.environment.checks import Severity
from megatron_vespo.environment.facts import installed_versions
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.placement import Node

# Seconds. torchrun's rendezvous takes a node for dead whose clock is 15 s behind.
_CLOCK_WARNING, _CLOCK_ERROR = 1.0, 60.0
_CLOCK_ROUNDS = 4
# Settings that must be the same everywhere; which interface a node uses may differ.
_COMPARED = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_", "NVTE_", "TORCH_NCCL_")
_NOT_COMPARED = ("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_TOPO_FILE", "NCCL_DEBUG_FILE")
_SHOWN_RANKS = 16


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What a rank tells the others.

    Attributes:
        host: Name of its node.
        versions: Of packages, by name; also ``NCCL``, ``device``, ``megatron_vespo`` (a digest of its sources) and
            ``configuration`` (a digest).
        settings: Environment variables that should be the same everywhere.
        import_error: Why a package that the configuration asks for cannot be imported.
        warnings: What is the matter with its node.
    """

    host: str
    versions: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)
    import_error: str = ""
    warnings: list[str] = field(default_factory=list)


class RankCheck(NamedTuple):
    """A check of what all ranks told; see ``checks.Check``."""

    name: str
    find: Callable[[Sequence[RankFacts]], str | None]
    severity: Severity
    remedy: str


def check_ranks(config: Config, warnings: list[str], clock: Callable[[], float] = time.time) -> None:
    """Compare the ranks, and tell what is the matter with any node, once. A collective.

    Args:
        config: Configuration.
        warnings: Of this rank's node, if this is the rank that checked it.
        clock: Seconds since whatever all nodes count from.

    Raises:
        UserError: What differs that must not, on every rank.
    """
    everyone = parallel.gather_values(read_rank(config, warnings), RankFacts)
    findings = [(check.severity, f"{problem}; {check.remedy}") for check in CHECKS if (problem := check.find(everyone))]
    if Node.from_environment().count > 1:
        findings += clock_findings([rank.host for rank in everyone], measure_clocks(clock))
    errors = [message for severity, message in findings if severity == "error"]
    if parallel.is_main():
        warn(_by_host(everyone))
        warn(message for severity, message in findings if severity == "warning")
    if errors:
        raise UserError("\n  ".join(errors))


def read_rank(config: Config, warnings: list[str]) -> RankFacts:
    """What this rank tells the others."""
    versions = installed_versions() | {
        "configuration": _digest(dump_config(config).encode()),
        "megatron_vespo": package_digest(Path(__file__).parents[1]),
    }
    if torch.cuda.is_available():
        versions["device"] = torch.cuda.get_device_name()
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return RankFacts(
        host=socket.gethostname(),
        versions=versions,
        settings={n: v for n, v in os.environ.items() if n.startswith(_COMPARED) and n not in _NOT_COMPARED},
        import_error=import_error("transformer_engine.pytorch") if config.model.layer_spec != "local" else "",
        warnings=warnings,
    )


def import_error(module: str) -> str:
    """Why a module cannot be imported; empty where it can. Megatron itself goes on without and says nothing."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def package_digest(folder: Path) -> str:
    """A digest of the Python files below a folder."""
    sources = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sources.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return sources.hexdigest()[:12]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def measure_clocks(clock: Callable[[], float]) -> list[float]:
    """Clocks of all ranks at one moment, in seconds. A collective.

    After a barrier they are read within a network round trip; of a few rounds the one with the least spread counts, so
    that a slow rank looks like no wrong clock.

    Args:
        clock: This rank's.
    """
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        parallel.barrier()
        rounds.append(parallel.gather_values(clock(), float))
    return min(rounds, key=lambda clocks: max(clocks) - min(clocks))


def clock_findings(hosts: Sequence[str], clocks: Sequence[float]) -> list[tuple[Severity, str]]:
    """What is wrong with the clocks; names the two that are farthest apart."""
    behind, ahead = clocks.index(min(clocks)), clocks.index(max(clocks))
    skew = clocks[ahead] - clocks[behind]
    if skew <= _CLOCK_WARNING:
        return []
    message = (
        f"the clock of {hosts[ahead]} (rank {ahead}) is {skew:.1f} s ahead of that of {hosts[behind]} (rank {behind});"
        " synchronise them (chrony, ntpd): torchrun takes a node that is 15 s behind for dead, and logs get out of"
        " order"
    )
    return [("error" if skew > _CLOCK_ERROR else "warning", message)]


def _by_host(everyone: Sequence[RankFacts]) -> list[str]:
    """Warnings of all nodes, each once, with the names of the nodes."""
    hosts: dict[str, list[str]] = {}
    for rank in everyone:
        for message in rank.warnings:
            hosts.setdefault(message, []).append(rank.host)
    if len({rank.host for rank in everyone}) == 1:
        return list(hosts)
    return [f"{', '.join(names)}: {message}" for message, names in hosts.items()]


def _differing(name: str, everyone: Sequence[RankFacts]) -> str | None:
    """Ranks whose version is not that of most."""
    return _split(name, [rank.versions.get(name, "not installed") for rank in everyone])


def _differing_settings(everyone: Sequence[RankFacts]) -> str | None:
    names = sorted({name for rank in everyone for name in rank.settings})
    splits = (_split(name, [rank.settings.get(name, "not set") for rank in everyone]) for name in names)
    return "; ".join(split for split in splits if split) or None


def _split(name: str, values: Sequence[str]) -> str | None:
    usual = Counter(values).most_common(1)[0][0]
    others: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        if value != usual:
            others.setdefault(value, []).append(rank)
    told = ", ".join(f"{value} on {_ranks(ranks)}" for value, ranks in others.items())
    return f"{name}: {told}, {usual} on the others" if others else None


def _ranks(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_SHOWN_RANKS]))}{more}"


def _import_errors(everyone: Sequence[RankFacts]) -> str | None:
    failed = [number for number, rank in enumerate(everyone) if rank.import_error]
    if not failed:
        return None
    first = everyone[failed[0]]
    return f"transformer_engine cannot be imported on {_ranks(failed)} ({first.host}): {first.import_error}"


_SAME_IMAGE = "use one image, or one shared environment, on all nodes"
CHECKS: tuple[RankCheck, ...] = (
    RankCheck(
        "Transformer Engine",
        _import_errors,
        "error",
        "it must be built for this torch and CUDA: use the image of the Dockerfile, or set model.layer_spec: local",
    ),
    *(
        RankCheck(name, partial(_differing, name), "error", _SAME_IMAGE)
        for name in ("torch", "megatron-core", "transformer-engine", "NCCL")
    ),
    RankCheck("transformers", partial(_differing, "transformers"), "warning", _SAME_IMAGE),
    RankCheck("megatron_vespo", partial(_differing, "megatron_vespo"), "error", "its sources differ: update all nodes"),
    RankCheck(
        "configuration", partial(_differing, "configuration"), "error", "give every node the same file and overrides"
    ),
    RankCheck("device", partial(_differing, "device"), "warning", "the job goes at the pace of the slowest"),
    RankCheck("settings", _differing_settings, "warning", "set them the same on all nodes"),
)
