"""Push weights to a real SGLang server by every transport in turn, and load and export them; prints ratios of one run.

PYTHONPATH=. .venv/bin/python benchmarks/weight_sync.py [--large] [--pushes 5] [--share 0.04]

Bytes, seconds, collectives and peak memory of each push stand beside the time that the machine takes to copy the same
weights once in memory. ``--large`` is the toy-width model of 48 layers x 128 experts, 18,867 tensors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist

from megatron_vespo.rollout.server import SGLangServer
from tests.tiny_models import make_tiny_qwen3_moe

if TYPE_CHECKING:  # importing them takes seconds, in which the server starts
    from megatron_vespo.models.export import HfExporter
    from megatron_vespo.weight_sync.sync import WeightSync
    from megatron_vespo.weight_sync.transport import Transport

LARGE: dict[str, Any] = {
    "num_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
}
SMALL: dict[str, Any] = {"num_layers": 8, "num_experts": 16, "hidden_size": 128}
BUCKET_BYTES = 16 * 2**20
VARIANTS = ("disk", "broadcast", "broadcast, not verified", "delta", "delta, not verified")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", action="store_true", help="18,867 tensors")
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--share", type=float, default=0.04, help="share of elements that change between pushes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_qwen3_moe(folder / "model", **(LARGE if options.large else SMALL))
        with SGLangServer(model, folder / "server.log") as server:
            measure(server, model, folder, options.pushes, options.share)


def measure(server: SGLangServer, model: Path, folder: Path, pushes: int, share: float) -> None:
    """Print the table."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    from megatron_vespo import parallel
    from megatron_vespo.models.export import HfExporter
    from megatron_vespo.models.registry import load_architecture
    from tests.policies import load_model

    parallel.initialize({}, seed=1)
    load_model(model, {})  # what is done only once is not measured
    chunks, load_seconds = timed(lambda: load_model(model, {}))
    exporter = HfExporter(chunks, load_architecture(model), BUCKET_BYTES)
    tensors = [tensor for bucket in exporter.stream() for _, tensor in bucket]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    flat = torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors])
    copy = min(timed(flat.clone)[1] for _ in range(5))
    export = min(timed(lambda: [len(bucket) for bucket in exporter.stream()])[1] for _ in range(pushes))
    print(f"{len(tensors)} tensors, {nbytes / 2**20:.1f} MiB; copying them once in memory takes {copy * 1e3:.1f} ms")
    for name, elapsed in (("load", load_seconds), ("export", export)):
        print(f"{name} {elapsed:.2f} s, {elapsed / copy:.0f} copies")
    server.wait_ready()
    calls = count_collectives()
    print(f"{'push by':26} {'seconds':>8} {'copies':>7} {'MiB':>8} {'calls':>6} {'peak/MiB':>9}")
    version = 0
    for variant in VARIANTS:
        sync = make_sync(variant, server.url, model, folder, exporter)
        sync.push(version)  # forms the group; of delta, sends all
        version += 1
        seconds, before = [], len(calls)
        for _ in range(pushes):
            change(chunks, share)
            metrics, elapsed = timed(partial(sync.push, version))
            seconds.append(elapsed)
            version += 1
        each = (len(calls) - before) / pushes
        peak = peak_resident_bytes(partial(sync.push, version))
        version += 1
        sync.close()
        median, sent = statistics.median(seconds), (metrics["perf/sync_bytes"] or 0.0) / 2**20
        print(f"{variant:26} {median:8.3f} {median / copy:7.0f} {sent:8.2f} {each:6.0f} {peak / 2**20:9.1f}")
    parallel.shutdown()


def make_sync(variant: str, url: str, model: Path, folder: Path, exporter: HfExporter) -> WeightSync:
    """One of :data:`VARIANTS`."""
    from megatron_vespo.rollout.client import SGLangClient
    from megatron_vespo.rollout.control import SGLangControl
    from megatron_vespo.rollout.fleet import Fleet
    from megatron_vespo.weight_sync.broadcast import BroadcastTransport
    from megatron_vespo.weight_sync.delta import DeltaTransport
    from megatron_vespo.weight_sync.disk import DiskTransport
    from megatron_vespo.weight_sync.servers import Servers
    from megatron_vespo.weight_sync.sync import WeightSync
    from megatron_vespo.weight_sync.verify import GroupReports

    fleet = Fleet(lambda: [url], lambda url: (SGLangControl(url), SGLangClient(url, vocab_size=1)))
    fleet.meet()
    servers = Servers()
    transports: dict[str, Callable[[], Transport]] = {
        "disk": lambda: DiskTransport(servers, folder / "weights", model),
        "broadcast": lambda: BroadcastTransport(servers),
        "delta": lambda: DeltaTransport(servers, BUCKET_BYTES),
    }
    kind, _, unverified = variant.partition(", ")
    return WeightSync(exporter, fleet, servers, transports[kind](), verify=None if unverified else GroupReports())


def timed[T](work: Callable[[], T]) -> tuple[T, float]:
    """Result and wall-clock seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def peak_resident_bytes(work: Callable[[], object]) -> int:
    """Most memory that the process held during ``work`` beyond what it held before; looked at every millisecond."""
    process = psutil.Process()
    before = peak = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak - before


def count_collectives() -> list[str]:
    """A list to which every collective and message of this process adds its name from now on."""
    calls: list[str] = []
    for name in ("isend", "irecv", "broadcast", "gather", "all_reduce", "all_gather_object"):
        original = getattr(dist, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    return calls


def change(chunks: Any, share: float) -> None:
    """Change about this share of all elements."""
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.mul_(1 + 0.001 * (torch.rand_like(parameter) < share))


if __name__ == "__main__":
    main()
