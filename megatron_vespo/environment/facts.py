"""What a node gives a run: facts, read once, without importing torch. What they mean is for ``checks``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from megatron_vespo.config import Config
from megatron_vespo.gpus import Gpus, read_gpus
from megatron_vespo.rollout.placement import Node

_PREFIXES = ("CUDA_", "GLOO_", "MASTER_", "NCCL_", "NVTE_", "PYTORCH_", "TORCH_NCCL_")
_INTERPRETER_SECONDS = 60

# Run by the servers' interpreter; it imports nothing but the standard library.
_QUERY = """
import importlib.metadata, importlib.util, json, pathlib
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
torch = importlib.util.find_spec("torch")
print(json.dumps({
    "sglang": version("sglang"),
    "package": importlib.util.find_spec("megatron_vespo") is not None,
    "torch": pathlib.Path(torch.origin).with_name("version.py").read_text() if torch else "",
}))
"""


@dataclass(frozen=True, kw_only=True)
class ServerEnvironment:
    """The environment of the run's own SGLang servers.

    Attributes:
        python: Their interpreter.
        error: Why it could not be asked.
        sglang: Version of SGLang; None where it is not installed.
        has_package: Whether ``megatron_vespo`` can be imported there.
        torch_cuda: CUDA version that its torch was built for.
    """

    python: str
    error: str | None = None
    sglang: str | None = None
    has_package: bool = True
    torch_cuda: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One node, and this job's share of it.

    Attributes:
        ranks: Trainer ranks on this node.
        nodes: Nodes with trainer ranks.
        node: Which of them this is.
        python: Version of the interpreter.
        versions: Versions of packages by name; a package that is not installed is missing.
        torch_cuda: CUDA version that torch was built for; None: a torch for CPUs, or none.
        gpus: GPUs and their driver.
        server: Environment of the run's own servers; None where the run starts none.
        environment: Variables that the libraries below read.
        interfaces: Network interfaces.
        infiniband: InfiniBand and RoCE devices.
        shared_memory: Total and free bytes of /dev/shm; None where there is none.
        open_files: Soft limit of file descriptors; None: unlimited.
        locked_memory: Soft limit of locked memory, in bytes; None: unlimited.
        free_disk: Free bytes where the run folder is or will be.
        weights: Bytes of the model's safetensors.
        own_addresses: What this node's name resolves to; asked only where there are several nodes.
        master_addresses: What MASTER_ADDR resolves to; likewise.
        master_answers: Whether the job's key-value store is where MASTER_ADDR leads; asked where that is this machine.
        one_machine: Whether the nodes are several agents of torchrun on this machine, as where somebody tries it.
    """

    ranks: int = 1
    nodes: int = 1
    node: int = 0
    python: tuple[int, int] = (3, 12)
    versions: Mapping[str, str] = field(default_factory=dict)
    torch_cuda: tuple[int, int] | None = None
    gpus: Gpus = field(default_factory=Gpus)
    server: ServerEnvironment | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    interfaces: tuple[str, ...] = ("lo",)
    infiniband: tuple[str, ...] = ()
    shared_memory: tuple[int, int] | None = None
    open_files: int | None = None
    locked_memory: int | None = None
    free_disk: int = 0
    weights: int = 0
    own_addresses: tuple[str, ...] = ()
    master_addresses: tuple[str, ...] = ()
    master_answers: bool = True
    one_machine: bool = False

    def setting(self, name: str) -> str:
        """An environment variable; empty where it is not set."""
        return self.environment.get(name, "")


def read_facts(config: Config, node: Node) -> Facts:
    """Read them; milliseconds, and one start of ``rollout.server.python`` where that is set.

    Args:
        config: Configuration of the run.
        node: This node and its trainer ranks.
    """
    environment = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
    several, master = node.count > 1, environment.get("MASTER_ADDR", "")
    master_addresses = _addresses(master) if several else ()
    answers = not (several and all_loopback(master_addresses)) or _master_answers()
    return Facts(
        ranks=node.ranks,
        nodes=node.count,
        node=node.number,
        python=sys.version_info[:2],
        versions=installed_versions(),
        torch_cuda=_torch_cuda(_source("torch/version.py")),
        gpus=read_gpus(environment.get("CUDA_VISIBLE_DEVICES")),
        server=_server(config),
        environment=environment,
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        infiniband=_names_in(Path("/sys/class/infiniband")),
        shared_memory=_space(Path("/dev/shm")),
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_memory=_limit(resource.RLIMIT_MEMLOCK),
        free_disk=shutil.disk_usage(_existing(config.run_folder)).free,
        weights=sum(path.stat().st_size for path in Path(config.model.hf_path).glob("*.safetensors")),
        own_addresses=_addresses(socket.gethostname()) if several else (),
        master_addresses=master_addresses,
        master_answers=answers,
        # A host's name may lead to a loopback address by mistake; whoever writes one means it.
        one_machine=several and answers and (master in ("localhost", "::1") or master.startswith("127.")),
    )


def installed_versions() -> dict[str, str]:
    """Versions of the packages that matter, as far as they are installed."""
    versions = {}
    for name in ("torch", "transformer-engine", "sglang", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # Of what would be imported: Megatron is often a checkout on PYTHONPATH, before or without an installed one.
    parts = dict(re.findall(r"^(\w+) = (\d+)$", _source("megatron/core/package_info.py"), re.MULTILINE))
    if parts:
        versions["megatron-core"] = ".".join(parts.get(name, "0") for name in ("MAJOR", "MINOR", "PATCH"))
    return versions


def _source(path: str) -> str:
    """Text of the first file of this name on ``sys.path``; empty where there is none."""
    found = next((file for folder in sys.path if (file := Path(folder) / path).is_file()), None)
    return found.read_text(encoding="utf-8") if found else ""


def _torch_cuda(version_file: str) -> tuple[int, int] | None:
    """The CUDA version in the text of ``torch/version.py``."""
    found = re.search(r"^cuda\b.*= '(\d+)\.(\d+)", version_file, re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


def _server(config: Config) -> ServerEnvironment | None:
    server = config.rollout.server
    if not (config.samples_from_server and server.is_own):
        return None
    if server.python is None:
        return ServerEnvironment(
            python=sys.executable,
            sglang=installed_versions().get("sglang"),
            torch_cuda=_torch_cuda(_source("torch/version.py")),
        )
    try:
        answer = subprocess.run(
            [server.python, "-c", _QUERY],
            capture_output=True,
            text=True,
            timeout=_INTERPRETER_SECONDS,
            check=True,
        ).stdout
    except subprocess.CalledProcessError as error:
        return ServerEnvironment(python=server.python, error=(error.stderr.splitlines() or ["it failed"])[-1])
    except (OSError, subprocess.TimeoutExpired) as error:
        return ServerEnvironment(python=server.python, error=str(error))
    found = json.loads(answer)
    return ServerEnvironment(
        python=server.python,
        sglang=found["sglang"],
        has_package=found["package"],
        torch_cuda=_torch_cuda(found["torch"]),
    )


def _limit(which: int) -> int | None:
    soft = resource.getrlimit(which)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _space(folder: Path) -> tuple[int, int] | None:
    if not folder.is_dir():
        return None
    usage = shutil.disk_usage(folder)
    return usage.total, usage.free


def _names_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ()


def _addresses(name: str) -> tuple[str, ...]:
    """What a name resolves to; nothing where it does not."""
    try:
        return tuple(sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)}))
    except OSError:
        return ()


def all_loopback(addresses: tuple[str, ...]) -> bool:
    """Whether a name leads to this machine alone; also one that leads nowhere."""
    return all(ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def _master_answers() -> bool:
    """Whether the job's key-value store, which torchrun starts before the ranks, is where they are told."""
    try:
        with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=2):
            return True
    except (OSError, KeyError):
        return False
