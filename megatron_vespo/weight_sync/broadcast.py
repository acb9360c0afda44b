"""Transport by broadcast: rank 0 of the trainer and the server's workers are one process group (gloo or NCCL)."""

from __future__ import annotations

import socket
import threading
import uuid
from concurrent.futures import Future
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_vespo import platform
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.protocol import TensorList
from megatron_vespo.weight_sync.sync import NamedTensors

TIMEOUT = timedelta(minutes=10)


def local_address(url: str) -> str:
    """The address under which the machine at ``url`` reaches this one."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # a datagram socket sends nothing when it connects
        return str(probe.getsockname()[0])


def join_group(store: dist.Store, *, world_size: int, name: str, backend: str) -> dist.ProcessGroup:
    """Rank 0's side of a process group beside the default one, whose other ranks are not in this job.

    torch has no public call for it; SGLang's own side does the same (sglang/srt/utils/common.py,
    init_custom_process_group), and both must agree on prefix and name.
    """
    group, _ = distributed_c10d._new_process_group_helper(
        world_size,
        0,
        [],
        distributed_c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=distributed_c10d.GroupName(name),
        timeout=TIMEOUT,
    )
    assert isinstance(group, dist.ProcessGroup)
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


class BroadcastTransport:
    """Broadcasts each bucket as one flat tensor (SGLang's ``flattened_bucket``).

    Args:
        control: The server.
        server_workers: Processes of the server that hold weights (its tensor-parallel size).

    Raises:
        UserError: The group could not be formed.
    """

    def __init__(self, control: SGLangControl, server_workers: int) -> None:
        self._control = control
        self._name = f"megatron_vespo_{uuid.uuid4().hex[:12]}"
        self._version = 0
        address, world_size, backend = local_address(control.base_url), 1 + server_workers, platform.backend()
        store = dist.TCPStore(address, 0, world_size, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        # In a thread, since each side waits for the other. A daemon: if the server refuses, nobody ever joins.
        joined: Future[dist.ProcessGroup] = Future()

        def join() -> None:
            try:
                joined.set_result(join_group(store, world_size=world_size, name=self._name, backend=backend))
            except RuntimeError as error:  # torch.distributed
                joined.set_exception(UserError(f"{control.base_url}: no process group for weights: {error}"))

        threading.Thread(target=join, daemon=True, name="weight-sync-join").start()
        control.init_weights_update_group(address, store.port, 1, world_size, self._name, backend)
        self._group = joined.result()

    def begin(self, version: int) -> None:
        """Open a weight update on the server."""
        self._version = version
        self._control.begin_weight_update()

    def send(self, tensors: NamedTensors) -> None:
        """Broadcast one bucket while the server receives it."""
        # Widest dtype first: the server wants each tensor at a multiple of its item size.
        ordered = sorted(tensors, key=lambda item: -item[1].dtype.itemsize)
        described = TensorList(
            names=[name for name, _ in ordered],
            dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
            shapes=[list(tensor.shape) for _, tensor in ordered],
        )
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for _, tensor in ordered])
        # Asynchronous, so that a server that refuses is heard at once and not when the broadcast times out.
        work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        self._control.update_weights_from_distributed(
            described, self._name, self._version, load_format="flattened_bucket"
        )
        assert work is not None
        work.wait()

    def finish(self) -> None:
        """Close the weight update."""
        self._control.end_weight_update()

    def close(self) -> None:
        """Leave the group; a server that is gone already has left it."""
        try:
            self._control.destroy_weights_update_group(self._name)
        except UserError:
            pass
        finally:
            dist.destroy_process_group(self._group)
