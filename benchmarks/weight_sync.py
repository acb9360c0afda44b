"""Push the same weights to a real SGLang server by disk and by broadcast, in turn; prints seconds and their ratio.

.venv/bin/python benchmarks/weight_sync.py [--layers 8] [--experts 16] [--pushes 10]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from megatron_vespo.rollout.server import SGLangServer
from tests.tiny_models import make_tiny_qwen3_moe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--pushes", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_tiny_qwen3_moe(
            folder / "model", hidden_size=128, num_layers=options.layers, num_experts=options.experts
        )
        with SGLangServer(model, folder / "server.log") as server:
            times = measure(server, model, folder, options.pushes)
    for transport, seconds in times.items():
        print(f"{transport:10} median {statistics.median(seconds):.3f} s  min {min(seconds):.3f} s")
    print(f"disk / broadcast: {statistics.median(times['disk']) / statistics.median(times['broadcast']):.2f}")


def measure(server: SGLangServer, model: Path, folder: Path, pushes: int) -> dict[str, list[float]]:
    """Seconds of each push, the transports taking turns so that a busy machine slows both."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from megatron_vespo import parallel
    from megatron_vespo.models.conversion import HfExporter
    from megatron_vespo.models.registry import load_architecture
    from megatron_vespo.rollout.control import SGLangControl
    from megatron_vespo.weight_sync.broadcast import BroadcastTransport
    from megatron_vespo.weight_sync.disk import DiskTransport
    from megatron_vespo.weight_sync.sync import WeightSync
    from tests.policies import load_model

    parallel.initialize({}, seed=1)
    exporter = HfExporter(load_model(model, {}), load_architecture(model))
    server.wait_ready()
    control = SGLangControl(server.url)
    syncs = {
        "disk": WeightSync(exporter, control, DiskTransport(control, folder / "weights", model)),
        "broadcast": WeightSync(exporter, control, BroadcastTransport(control, server_workers=1)),
    }
    times: dict[str, list[float]] = {name: [] for name in syncs}
    for version in range(2 * pushes):
        name = ("disk", "broadcast")[version % 2]
        start = time.perf_counter()
        syncs[name].push(version)
        times[name].append(time.perf_counter() - start)
    parallel.shutdown()
    return times


if __name__ == "__main__":
    main()
