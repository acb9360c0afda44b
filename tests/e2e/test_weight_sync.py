"""Pushes to the real SGLang, seen from the memory of its workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.models.export import Exporter, HfExporter
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.weight_sync.broadcast import BroadcastTransport
from megatron_vespo.weight_sync.delta import DeltaTransport
from megatron_vespo.weight_sync.disk import DiskTransport
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.sync import WeightSync
from megatron_vespo.weight_sync.tensor import SharedBucket, SharedExporter, TensorTransport
from megatron_vespo.weight_sync.transport import Transport
from megatron_vespo.weight_sync.verify import FileReports, GroupReports
from tests.policies import load_model
from tests.ranks import run_ranks

EP2 = {"expert_model_parallel_size": 2}
BUCKET_BYTES = 40_000


def checksums(url: str) -> dict[str, str]:
    """Of every parameter in the server's memory, by SGLang's own means; tensor-parallel ranks one after the other."""
    answer = httpx.post(f"{url}/weights_checker", json={"action": "checksum"}, timeout=60).json()
    assert answer["success"], answer
    payload = answer["payload"] if "payload" in answer else answer["ranks"]
    return {f"{rank}/{name}": value for rank, part in enumerate(payload) for name, value in part["checksums"].items()}


def spoil(url: str) -> None:
    """Overwrite all weights in the server's memory."""
    httpx.post(f"{url}/weights_checker", json={"action": "reset_tensors"}, timeout=60).raise_for_status()


def changed_in_place(chunks: Any, share: float, round_: int) -> None:
    """Other bits in about this share of every weight's elements."""
    torch.manual_seed(round_)
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.mul_(1 + 0.5 * (torch.rand_like(parameter) < share))


def make_sync(kind: str, urls: dict[str, int], model: Path, chunks: Any, folder: Path, verify: bool) -> WeightSync:
    """``urls``: tensor-parallel size by address."""
    exporter: Exporter = HfExporter(chunks, load_architecture(model), BUCKET_BYTES)
    if kind == "tensor":
        exporter = SharedExporter(exporter)
    reports = (FileReports(folder / "reports") if kind == "tensor" else GroupReports()) if verify else None
    if not parallel.is_main():
        return WeightSync(exporter, None, None, None, verify=reports)
    fleet = Fleet(lambda: list(urls), lambda url: (SGLangControl(url), SGLangClient(url, vocab_size=64)))
    assert [info.tensor_parallel_size for info in fleet.meet()] == list(urls.values())
    servers = Servers()
    transports: dict[str, Transport] = {
        "disk": DiskTransport(servers, folder, model),
        "broadcast": BroadcastTransport(servers),
        "delta": DeltaTransport(servers, BUCKET_BYTES),
        "tensor": TensorTransport(servers),
    }
    return WeightSync(exporter, fleet, servers, transports[kind], verify=reports)


def checksums_everywhere(urls: dict[str, int]) -> list[dict[str, str]]:
    sums = [checksums(url) for url in urls] if parallel.is_main() else []
    parallel.barrier()
    return sums


def push_changes(urls: dict[str, int], model: Path, folder: Path) -> list[tuple[Any, Any, Any]]:
    """Rounds of changes: checksums after a delta push, after a full push of the same weights, metrics of the delta."""
    chunks = load_model(model, EP2)
    delta = make_sync("delta", urls, model, chunks, folder, verify=True)
    rounds = []
    for version, share in enumerate((1.0, 0.05, 0.0, 0.3, 0.01)):
        changed_in_place(chunks, share, version)
        metrics = delta.push(version)
        after_delta = checksums_everywhere(urls)
        full = make_sync("disk", urls, model, chunks, folder / str(version), verify=False)
        full.push(version)
        full.close()
        rounds.append((after_delta, checksums_everywhere(urls), metrics))
    delta.close()
    return rounds


def test_changes_leave_the_bits_of_a_full_push(sglang_server: SGLangServer, tmp_path: Path) -> None:
    urls = {sglang_server.url: 1}
    rounds = run_ranks(2, push_changes, urls, sglang_server.model_path, tmp_path, **EP2)[0]
    seen = [tuple(after_full[0].values()) for _, after_full, _ in rounds]
    assert seen[1] == seen[2] and len(set(seen)) == 4, "each round but the one without a change has other weights"
    for after_delta, after_full, _ in rounds:
        assert after_delta == after_full
    whole, few, none, many, fewest = (metrics for _, _, metrics in rounds)
    assert whole["perf/sync_changed_share"] == 1
    assert few["perf/sync_changed_share"] == pytest.approx(0.05, abs=0.02)
    assert none["perf/sync_bytes"] < 1000
    assert fewest["perf/sync_bytes"] < few["perf/sync_bytes"] < many["perf/sync_bytes"] < whole["perf/sync_bytes"]
    assert few["perf/sync_bytes"] < 0.15 * whole["perf/sync_bytes"]
    assert all(metrics["perf/sync_repairs"] == 0 for _, _, metrics in rounds)


def push_to_spoiled(kind: str, urls: dict[str, int], model: Path, folder: Path) -> tuple[Any, Any, Any]:
    """A push, spoiled weights, a push; error or metrics of the second, and checksums after both."""
    chunks = load_model(model, EP2)
    sync = make_sync(kind, urls, model, chunks, folder, verify=True)
    sync.push(0)
    before = checksums_everywhere(urls)
    if parallel.is_main():
        spoil(next(iter(urls)))
    parallel.barrier()
    metrics = sync.push(1)
    after = checksums_everywhere(urls)
    sync.close()
    return before, after, metrics


def test_a_server_that_lost_its_weights_gets_all_again(sglang_server: SGLangServer, tmp_path: Path) -> None:
    urls = {sglang_server.url: 1}
    before, after, metrics = run_ranks(2, push_to_spoiled, "delta", urls, sglang_server.model_path, tmp_path, **EP2)[0]
    assert metrics["perf/sync_repairs"] == 1
    assert before == after


class Corrupting:
    """A transport that loses one bit of one weight on the way."""

    def __init__(self, transport: Transport, name: str) -> None:
        self.inner, self.name = transport, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def send(self, tensors: Any) -> None:
        if isinstance(tensors, SharedBucket):
            self.corrupt_shared(tensors)
            self.inner.send(tensors)
            return
        self.inner.send([(name, self.corrupt(tensor) if name == self.name else tensor) for name, tensor in tensors])

    def corrupt_shared(self, tensors: SharedBucket) -> None:
        """In the memory that the workers read, which on a CPU is the last rank's."""
        ((path, nbytes),) = tensors.memory.values()
        flat = torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8)
        position = 0
        for name, tensor in tensors:
            position += tensor.nbytes
            if name == self.name:
                flat[position - 4] ^= 1

    def corrupt(self, tensor: torch.Tensor) -> torch.Tensor:
        corrupted = tensor.clone()
        corrupted.view(-1)[-1:].view(torch.int32).bitwise_xor_(1)
        return corrupted


def push_corrupted(kind: str, urls: dict[str, int], model: Path, folder: Path, name: str, verify: bool) -> str:
    chunks = load_model(model, EP2)
    sync = make_sync(kind, urls, model, chunks, folder, verify)
    if sync._transport is not None:
        sync._transport = Corrupting(sync._transport, name)  # type: ignore[assignment]
    try:
        sync.push(0)
        return ""
    except UserError as error:
        return str(error)
    finally:
        sync.close()


@pytest.mark.parametrize("kind", ["disk", "broadcast", "tensor"])
def test_a_lost_bit_is_an_error_on_every_rank(sglang_server: SGLangServer, tmp_path: Path, kind: str) -> None:
    urls, name = {sglang_server.url: 1}, "model.layers.1.mlp.experts.3.down_proj.weight"
    args = (kind, urls, sglang_server.model_path, tmp_path, name, True)
    for message in run_ranks(2, push_corrupted, *args, **EP2):
        assert f"1 tensors differ on the server from what was pushed: {name}" in message
    with SGLangControl(sglang_server.url) as control:  # what the failed push left open
        control.end_weight_update()
        control.continue_generation()


@pytest.fixture(scope="module")
def sharded_server(sglang_server: SGLangServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """A second server, its weights split over two workers."""
    log = tmp_path_factory.mktemp("sharded") / "server.log"
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with SGLangServer(sglang_server.model_path, log, args={"tp_size": 2}, environment=environment) as server:
        server.wait_ready()
        yield server


def push_to_two(urls: dict[str, int], model: Path, folder: Path) -> list[Any]:
    """Per transport: metrics and checksums after pushing new weights, and after spoiling one server and pushing."""
    chunks = load_model(model, EP2)
    results = []
    for number, kind in enumerate(("disk", "broadcast", "tensor", "delta")):
        changed_in_place(chunks, 0.5, number)
        sync = make_sync(kind, urls, model, chunks, folder, verify=True)
        sync.push(2 * number)
        pushed = checksums_everywhere(urls)
        if parallel.is_main():
            spoil(list(urls)[-1])
        parallel.barrier()
        metrics = sync.push(2 * number + 1)
        results.append((pushed, checksums_everywhere(urls), metrics))
        sync.close()
    return results


def test_every_server_and_worker_gets_every_push(
    sglang_server: SGLangServer, sharded_server: SGLangServer, tmp_path: Path
) -> None:
    urls = {sglang_server.url: 1, sharded_server.url: 2}
    results = run_ranks(2, push_to_two, urls, sglang_server.model_path, tmp_path, **EP2)[0]
    for pushed, again, _ in results:
        assert pushed == again
    for server in (0, 1):
        assert len({tuple(pushed[server].values()) for pushed, _, _ in results}) == 4
    assert any(name.startswith("1/") for name in results[0][0][1]), "the second server has two workers"
    assert [metrics["perf/sync_repairs"] for _, _, metrics in results] == [0, 0, 0, 1]
    with SGLangControl(sharded_server.url) as control:
        assert control.weight_version() == 7
