"""What can be wrong with a node, as a table: each check is a pure function of the facts and the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from megatron_vespo.config import Config
from megatron_vespo.environment import network
from megatron_vespo.environment.facts import Facts
from megatron_vespo.gpus import expandable_segments
from megatron_vespo.rollout.placement import FEWER_GPUS, missing_gpus

PYTHON = (3, 12)
MEGATRON = "0.19.2"
SGLANG = "0.5.23"
OLDEST_TORCH = (2, 10)

MIB, GIB = 1024**2, 1024**3
# Docker's /dev/shm; what NCCL and the ranks of a node share goes beyond it at once.
_DOCKERS_SHARED_MEMORY = 64 * MIB
_SHARED_MEMORY = GIB
# Below it not even logs and metrics fit.
_FULL_DISK = 256 * MIB
# A checkpoint holds 2 bytes of weights and 12 of float32 weights and Adam's moments a parameter; the model folder 2.
_CHECKPOINT_PER_WEIGHT_BYTE = 7
# Descriptors beside one for every request in flight: libraries, files, connections among ranks and to workers.
_OTHER_FILES = 256

Severity = Literal["error", "warning"]
Finder = Callable[[Facts, Config], str | None]


class Check(NamedTuple):
    """One check.

    Attributes:
        name: What it looks at.
        find: What is wrong, in words that name it; None where nothing is.
        severity: An ``error`` ends the run, a ``warning`` is told.
        remedy: What to do.
    """

    name: str
    find: Finder
    severity: Severity
    remedy: str


class Finding(NamedTuple):
    """What a check found."""

    check: str
    severity: Severity
    message: str


def examine(facts: Facts, config: Config) -> list[Finding]:
    """All that is wrong with this node, in the order of the table."""
    found = ((check, check.find(facts, config)) for check in CHECKS)
    return [Finding(c.name, c.severity, f"{problem}; {c.remedy}") for c, problem in found if problem is not None]


def _python(facts: Facts, config: Config) -> str | None:
    return None if facts.python >= PYTHON else f"Python {_dotted(facts.python)} is too old"


def _torch(facts: Facts, config: Config) -> str | None:
    version = facts.versions.get("torch")
    if version is None:
        return "torch is not installed"
    numbers = tuple(int(part) for part in version.split(".")[:2])
    return f"torch {version} is older than {_dotted(OLDEST_TORCH)}" if numbers < OLDEST_TORCH else None


def _torch_without_cuda(facts: Facts, config: Config) -> str | None:
    if facts.gpus.count and "torch" in facts.versions and facts.torch_cuda is None:
        return f"this node has {_gpus(facts)}, but torch {facts.versions['torch']} was built without CUDA"
    return None


def _megatron(facts: Facts, config: Config) -> str | None:
    version = facts.versions.get("megatron-core", "is not installed")
    return None if config.objective == "rollout" or version == MEGATRON else f"megatron-core: {version}"


def _transformer_engine(facts: Facts, config: Config) -> str | None:
    if config.model.layer_spec != "transformer_engine" or "transformer-engine" in facts.versions:
        return None
    return "model.layer_spec: transformer_engine, but transformer-engine is not installed"


def _interpreter(facts: Facts, config: Config) -> str | None:
    server = facts.server
    if server is None:
        return None
    if server.error is not None:
        return f"rollout.server.python: {server.python} does not run: {server.error}"
    if server.sglang is None:
        return f"SGLang is not installed for {server.python}"
    return None if server.has_package else f"rollout.server.python: {server.python} cannot import megatron_vespo"


def _sglang(facts: Facts, config: Config) -> str | None:
    version = None if facts.server is None else facts.server.sglang
    return None if version in (None, SGLANG) else f"SGLang {version} at {facts.server and facts.server.python}"


def _driver(facts: Facts, config: Config) -> str | None:
    builds = {"torch": facts.torch_cuda}
    if facts.server is not None and config.rollout.server.device == "cuda":
        builds["the servers' torch"] = facts.server.torch_cuda
    driver = facts.gpus.cuda
    # Within a major version any driver runs any build.
    late = [f"{name} was built for CUDA {_dotted(cuda)}" for name, cuda in builds.items() if _later(cuda, driver)]
    return (
        f"the driver {facts.gpus.driver} runs CUDA {_dotted(driver)}, but {', '.join(late)}"
        if driver and late
        else None
    )


def _no_gpu(facts: Facts, config: Config) -> str | None:
    if facts.gpus.count:
        return None
    asked = {
        "model.layer_spec: transformer_engine": config.model.layer_spec == "transformer_engine",
        "rollout.server.device: cuda": facts.server is not None and config.rollout.server.device == "cuda",
    }
    needs = [name for name, holds in asked.items() if holds]
    visible = facts.environment.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    return f"{' and '.join(needs)}, but this node shows no GPU{hidden}" if needs else None


def _few_gpus(facts: Facts, config: Config) -> str | None:
    return missing_gpus(config, facts.ranks, facts.gpus.count) if facts.gpus.count else None


def _connections(facts: Facts, config: Config) -> str | None:
    value = facts.environment.get("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    blackwell = facts.gpus.capability is not None and facts.gpus.capability >= (10, 0)
    parallel = config.megatron.get("tensor_model_parallel_size", 1) > 1
    # That one wants more connections, and upstream leaves the choice to the user.
    overlaps = config.megatron.get("overlap_moe_expert_parallel_comm", False)
    if value == "1" or not facts.gpus.count or blackwell or not parallel or overlaps:
        return None
    return f"CUDA_DEVICE_MAX_CONNECTIONS={value} with megatron.tensor_model_parallel_size above 1"


def _allocator(facts: Facts, config: Config) -> str | None:
    setting = expandable_segments(facts.environment)
    return f"{setting} with placement.mode: colocate" if setting and config.placement.mode == "colocate" else None


def _docker_shared_memory(facts: Facts, config: Config) -> str | None:
    if not facts.gpus.count or facts.shared_memory is None or facts.shared_memory[0] > _DOCKERS_SHARED_MEMORY:
        return None
    return f"/dev/shm has {_size(facts.shared_memory[0])}, Docker's default, and NCCL and SGLang need more"


def _little_shared_memory(facts: Facts, config: Config) -> str | None:
    if not facts.gpus.count or facts.shared_memory is None or _docker_shared_memory(facts, config):
        return None
    free = facts.shared_memory[1]
    return f"/dev/shm has {_size(free)} free" if free < _SHARED_MEMORY else None


def _open_files(facts: Facts, config: Config) -> str | None:
    needed = _OTHER_FILES + (config.rollout.concurrency if config.samples_from_server else 0)
    if facts.open_files is None or facts.open_files >= needed:
        return None
    return f"a process may open {facts.open_files} files, and about {needed} are needed (rollout.concurrency)"


def _locked_memory(facts: Facts, config: Config) -> str | None:
    if facts.nodes == 1 or not facts.infiniband or not facts.gpus.count or facts.locked_memory is None:
        return None
    return f"a process may lock {_size(facts.locked_memory)} of memory, and RDMA between nodes locks its buffers"


def _full_disk(facts: Facts, config: Config) -> str | None:
    if facts.free_disk >= _FULL_DISK:
        return None
    return f"{config.run_folder}: {_size(facts.free_disk)} free, too little for logs and metrics"


def _little_disk(facts: Facts, config: Config) -> str | None:
    checkpoints = config.checkpoint.keep + 1 if config.checkpoint.interval else 1
    # The folder of the latest weights is replaced by a complete one.
    needed = facts.weights * (_CHECKPOINT_PER_WEIGHT_BYTE * checkpoints + 2)
    if config.objective == "rollout" or _full_disk(facts, config) or facts.free_disk >= needed:
        return None
    return (
        f"{config.run_folder}: {_size(facts.free_disk)} free, and {checkpoints} checkpoints and a model folder take"
        f" about {_size(needed)}"
    )


def _later(cuda: tuple[int, int] | None, driver: tuple[int, int] | None) -> bool:
    return cuda is not None and driver is not None and cuda[0] > driver[0]


def _dotted(numbers: tuple[int, int] | None) -> str:
    return ".".join(map(str, numbers or ()))


def _gpus(facts: Facts) -> str:
    return f"{facts.gpus.count} GPU{'s' if facts.gpus.count > 1 else ''}"


def _size(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / MIB:,.0f} MiB"


_IMAGE = "use the image of the Dockerfile, or tools/setup_env.sh on a machine without GPUs"
_IFNAME = "name an interface of every node, or unset it"
_HOSTS = "give the node's name its real address in /etc/hosts or DNS"
_SHM = "start the container with --ipc=host or --shm-size=64g; in Kubernetes mount an emptyDir of medium Memory"
_DISK = "make room, or choose another run.folder"

CHECKS: tuple[Check, ...] = (
    Check("Python", _python, "error", f"Megatron-Core {MEGATRON} needs {_dotted(PYTHON)} or newer"),
    Check("torch", _torch, "error", f"install {_dotted(OLDEST_TORCH)} or newer; {_IMAGE}"),
    Check("torch's CUDA", _torch_without_cuda, "warning", "training would run on the CPU: install a torch with CUDA"),
    Check("Megatron-Core", _megatron, "error", f"install megatron-core=={MEGATRON}; {_IMAGE}"),
    Check("Transformer Engine", _transformer_engine, "error", f"{_IMAGE}, or set model.layer_spec: local"),
    Check(
        "SGLang's environment",
        _interpreter,
        "error",
        "name an interpreter that has sglang, and megatron_vespo on its PYTHONPATH, in rollout.server.python",
    ),
    Check("SGLang", _sglang, "warning", f"only {SGLANG} is tested: pip install sglang=={SGLANG}"),
    Check(
        "driver", _driver, "error", "install a newer driver, or an image for the driver's CUDA (build argument BASE)"
    ),
    Check(
        "GPUs",
        _no_gpu,
        "error",
        "start the container with --gpus all, ask Slurm for --gpus-per-node or Kubernetes for nvidia.com/gpu",
    ),
    Check(
        "number of GPUs",
        _few_gpus,
        "error",
        FEWER_GPUS,
    ),
    Check(
        "launch order",
        _connections,
        "error",
        "before Blackwell Megatron's overlap needs kernels launched in order: set it to 1, or unset it",
    ),
    Check(
        "allocator",
        _allocator,
        "error",
        "SGLang, which inherits it, cannot release memory that lies in expandable segments: leave the setting out",
    ),
    Check("gloo's interface", network.gloo_interfaces, "error", _IFNAME),
    Check("NCCL's interface", network.nccl_interfaces, "error", _IFNAME),
    Check("NCCL's InfiniBand", network.nccl_devices, "warning", "NCCL would fall back to TCP: correct it, or unset it"),
    Check("loopback interface", network.loopback_interfaces, "error", _IFNAME),
    Check("MASTER_ADDR", network.master, "error", f"{_HOSTS}, or use an address that all nodes reach"),
    Check(
        "name of the node", network.own_name, "error", f"{_HOSTS}, or set GLOO_SOCKET_IFNAME to the nodes' interface"
    ),
    Check("shared memory", _docker_shared_memory, "error", _SHM),
    Check("free shared memory", _little_shared_memory, "warning", f"below 1 GiB NCCL may fail to start: {_SHM}"),
    Check("open files", _open_files, "warning", "raise it: ulimit -n 65536, or --ulimit nofile=65536 for a container"),
    Check(
        "locked memory",
        _locked_memory,
        "warning",
        "lift it: ulimit -l unlimited, or --ulimit memlock=-1; in Kubernetes IPC_LOCK",
    ),
    Check("disk", _full_disk, "error", _DISK),
    Check("free disk", _little_disk, "warning", f"{_DISK}, or keep fewer (checkpoint.keep)"),
)
