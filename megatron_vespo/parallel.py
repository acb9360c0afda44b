"""Ranks and groups: the only reader of Megatron's ``parallel_state``.

Everything else asks here, in the words of the field: data-parallel rank, last pipeline stage, who owns a weight.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from megatron_vespo import platform
from megatron_vespo.errors import UserError
from megatron_vespo.megatron_options import DEFAULT_EXPERT_TENSOR_PARALLEL_SIZE
from megatron_vespo.megatron_options import data_parallel_size as data_parallel_size_of
from megatron_vespo.platform.megatron import import_without_trackers

platform.prepare()
import_without_trackers()  # ranks come here before anything else of Megatron

from megatron.core import parallel_state as mpu  # noqa: E402 - after prepare()
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.utils import configure_nvtx_profiling  # noqa: E402


def initialize(megatron: dict[str, Any], seed: int, *, timeout_minutes: float = 30) -> None:
    """Join the job torchrun started and build Megatron's process groups.

    Args:
        megatron: The ``megatron:`` section; its ``*_parallel_size`` fields give the layout.
        seed: Seeds Megatron's random streams, a different one for each tensor-parallel rank and pipeline stage.
        timeout_minutes: Longest wait in one collective.

    Raises:
        UserError: The layout does not fit the number of ranks.
    """
    data_parallel_size_of(megatron, int(os.environ["WORLD_SIZE"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group(platform.backend(), timeout=timedelta(minutes=timeout_minutes))
    sizes = {name: megatron[name] for name in _SIZES if name in megatron}
    sizes.setdefault("expert_tensor_parallel_size", DEFAULT_EXPERT_TENSOR_PARALLEL_SIZE)
    mpu.initialize_model_parallel(**sizes)
    seed_random(seed)


def seed_random(seed: int) -> None:
    """Seed torch and Megatron's random streams, the latter differently on each tensor-parallel rank and stage."""
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def initialize_alone() -> None:
    """Megatron's process groups for a process outside any job: one rank, no port, no environment variables."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mpu.initialize_model_parallel(expert_tensor_parallel_size=DEFAULT_EXPERT_TENSOR_PARALLEL_SIZE)
    model_parallel_cuda_manual_seed(0)


_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def shutdown() -> None:
    """Leave the process groups."""
    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()


def rank() -> int:
    """Rank of this process in the job."""
    return dist.get_rank()


def world_size() -> int:
    """Number of ranks in the job."""
    return dist.get_world_size()


def is_main() -> bool:
    """Whether this is rank 0, which talks to SGLang, to files and to people."""
    return rank() == 0


def layout() -> dict[str, int]:
    """What says which part of the model and of the samples each rank holds."""
    return {
        "ranks": world_size(),
        "tensor_parallel": tensor_parallel_size(),
        "pipeline_parallel": mpu.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": mpu.get_virtual_pipeline_model_parallel_world_size() or 1,
        "expert_parallel": expert_parallel_size(),
        "expert_tensor_parallel": expert_tensor_parallel_size(),
    }


def data_parallel_rank() -> int:
    """Which replica of the dense weights this rank belongs to."""
    return mpu.get_data_parallel_rank()


def data_parallel_size() -> int:
    """Number of replicas of the dense weights: ranks that get different samples."""
    return mpu.get_data_parallel_world_size()


def tensor_parallel_rank() -> int:
    """Which shard of the vocabulary and of the dense weights this rank holds."""
    return mpu.get_tensor_model_parallel_rank()


def tensor_parallel_size() -> int:
    """Number of tensor-parallel shards."""
    return mpu.get_tensor_model_parallel_world_size()


def tensor_parallel_group() -> dist.ProcessGroup:
    """Ranks among which the vocabulary is split."""
    return mpu.get_tensor_model_parallel_group()


def is_first_stage(vp_stage: int | None = None) -> bool:
    """Whether this rank embeds tokens; of an interleaved pipeline, whether this virtual stage of it does."""
    return mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def is_last_stage(vp_stage: int | None = None) -> bool:
    """Whether this rank computes log-probabilities and the loss; or this virtual stage of it."""
    return mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)


def expert_parallel_rank() -> int:
    """Which share of the experts this rank holds."""
    return mpu.get_expert_model_parallel_rank()


def expert_parallel_size() -> int:
    """Over how many ranks the experts are spread."""
    return mpu.get_expert_model_parallel_world_size()


def expert_tensor_parallel_rank() -> int:
    """Which shard of an expert this rank holds."""
    return mpu.get_expert_tensor_parallel_rank()


def expert_tensor_parallel_size() -> int:
    """Into how many shards an expert is split."""
    return mpu.get_expert_tensor_parallel_world_size()


def owns_dense_weights() -> bool:
    """Whether this rank is the one of its data-parallel replicas that speaks for the dense weights."""
    return mpu.get_data_parallel_rank() == 0


def owns_expert_weights() -> bool:
    """Whether this rank is the one of its expert-data-parallel replicas that speaks for its experts."""
    return mpu.get_expert_data_parallel_rank() == 0


def reports_samples() -> bool:
    """Whether this rank alone reports the results of its samples: last stage, first tensor-parallel rank."""
    return is_last_stage() and tensor_parallel_rank() == 0


def separate_store(name: str) -> dist.Store:
    """The job's key-value store over a connection of its own: a thread may wait for it beside what the main one does.

    Args:
        name: Comes before the keys.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives its ranks
    if world_size() == 1:
        return dist.PrefixStore(name, dist.HashStore())
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, timeout=timedelta(minutes=1), wait_for_workers=False)
    return dist.PrefixStore(f"{name}/{attempt}", store)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


def all_true(here: bool | torch.Tensor) -> bool:
    """Whether it holds on every rank; the same answer everywhere."""
    holds = torch.as_tensor(here, device=platform.device()).float()
    dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds.item())


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; the same answer on all of them. A collective."""
    return not all_true(not flag)


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def gather_values[T](value: T, kind: type[T]) -> list[T]:
    """Values of all ranks, in rank order, on every rank. A collective.

    They travel as msgpack: what comes from the network is never unpickled.

    Args:
        value: This rank's.
        kind: Its type, in full: of numbers, text, lists, dicts, tuples, dataclasses.
    """
    payload = msgspec.msgpack.encode(value)
    device = platform.device()
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=device)
    sizes[rank()] = len(payload)
    dist.all_reduce(sizes)
    longest = int(sizes.max())
    data = torch.frombuffer(bytearray(payload.ljust(longest, b"\0")), dtype=torch.uint8).to(device)
    gathered = torch.empty(world_size() * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(gathered, data)
    parts = gathered.cpu().numpy().reshape(world_size(), longest)
    return [
        msgspec.msgpack.decode(part[:size].tobytes(), type=kind)
        for part, size in zip(parts, sizes.tolist(), strict=True)
    ]


def gather_on_main(value: Any) -> list[Any] | None:
    """Objects of all ranks, in rank order, on rank 0; None elsewhere. Pickled, as torch itself does for checkpoints."""
    values: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def broadcast_bytes(payload: bytes | None) -> bytes:
    """Rank 0's payload on every rank.

    Args:
        payload: Bytes on rank 0, None elsewhere.
    """
    device = platform.device()
    size = torch.tensor([len(payload) if payload is not None else 0], dtype=torch.int64, device=device)
    dist.broadcast(size, src=0)
    if payload is not None:
        data = torch.frombuffer(bytearray(payload) or bytearray(1), dtype=torch.uint8)[: len(payload)].to(device)
    else:
        data = torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(data, src=0)
    return payload if payload is not None else data.cpu().numpy().tobytes()


def on_main(action: Callable[[], None]) -> None:
    """Run something on rank 0 alone and fail on every rank if it failed there.

    Raises:
        UserError: What rank 0 raised, on every rank, so that none waits for a rank that has gone.
    """

    def act() -> bool:
        action()
        return True

    ask_main(act)


def on_every(action: Callable[[], None]) -> None:
    """Run something on every rank and fail on every rank if it failed on any. A collective.

    Raises:
        UserError: What the first rank raised that did, on every rank.
    """
    word = ""
    try:
        action()
    except UserError as error:
        word = str(error) or type(error).__name__
    failures = [failure for failure in gather_values(word, str) if failure]
    if failures:
        raise UserError(failures[0])


def ask_main(question: Callable[[], bool]) -> bool:
    """Rank 0's answer, on every rank. Raises as :func:`on_main`."""
    word = b""
    if is_main():
        try:
            word = b"yes" if question() else b"no"
        except UserError as error:
            word = b"!" + (str(error) or type(error).__name__).encode()
    word = broadcast_bytes(word if is_main() else None)
    if word.startswith(b"!"):
        raise UserError(word[1:].decode())
    return word == b"yes"


def mark_model_ranges(on: bool) -> None:
    """Let Megatron's modules name their part of the time for Nsight Systems, or no longer."""
    configure_nvtx_profiling(on)
