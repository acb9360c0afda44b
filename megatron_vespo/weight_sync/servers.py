"""The servers that get every push, and the process group that rank 0 forms with all of their workers."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_vespo import platform
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.sglang_weights import LOADER
from megatron_vespo.sglang_weights.wire import Request

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


class Servers:
    """Does the same on all servers at once; on rank 0.

    One process group (gloo on CPU, NCCL on GPU) holds rank 0 and the workers of all servers, formed when it is first
    needed: what rank 0 broadcasts reaches every server in one collective.

    Args:
        controls: Their control routes.
        workers: Processes of each that hold weights: its tensor-parallel size.
    """

    def __init__(self, controls: Sequence[SGLangControl], workers: Sequence[int]) -> None:
        self.controls, self.workers = tuple(controls), tuple(workers)
        self.group_name = f"megatron_vespo_{uuid.uuid4().hex[:12]}"
        self._group: dist.ProcessGroup | None = None

    @property
    def urls(self) -> str:
        """Addresses, for messages."""
        return ", ".join(control.base_url for control in self.controls)

    def each[T](self, call: Callable[[SGLangControl], T]) -> list[T]:
        """Results of ``call`` for every server, concurrently; the first failure is raised at once.

        Threads are daemons: one whose server waits for another that failed must not keep the process alive.
        """
        if len(self.controls) == 1:
            return [call(self.controls[0])]
        return _first_failure([_in_thread(partial(call, control)) for control in self.controls])

    def broadcast(self, flat: torch.Tensor, announce: Callable[[SGLangControl], None]) -> None:
        """Send one tensor to all workers.

        Args:
            flat: What to send.
            announce: Has a server receive it; returns when the server has used it.

        Raises:
            UserError: A server refused or died, or the group could not be formed.
        """
        # Asynchronous, so that a server that refuses is heard at once and not when the collective times out.
        work = dist.broadcast(flat, src=0, group=self._join(), async_op=True)
        self.each(announce)
        assert work is not None
        work.wait()

    def gather(self, like: torch.Tensor, announce: Callable[[SGLangControl], None]) -> list[torch.Tensor]:
        """A tensor of the form of ``like`` from each worker, each server's tensors stacked: [workers, ...].

        Raises:
            UserError: As for :meth:`broadcast`.
        """
        parts = [torch.empty_like(like) for _ in range(1 + sum(self.workers))]
        work = dist.gather(like, parts, dst=0, group=self._join(), async_op=True)
        self.each(announce)
        assert work is not None
        work.wait()
        return list(torch.stack(parts[1:]).split(list(self.workers)))

    def load(self, control: SGLangControl, request: Request, version: int | None = None) -> None:
        """Have the workers of one server carry out a request; for the ``announce`` of the collectives.

        Args:
            control: The server; it was started with our loader as ``custom_weight_loader``.
            request: What to do.
            version: Policy version of the weights afterwards; None leaves it as it is.
        """
        workers = self.workers[self.controls.index(control)]
        control.update_weights_with_loader(LOADER, request.encode(), workers, version)

    def close(self) -> None:
        """Leave the group, which a server that is gone already has left, and close the connections."""
        if self._group is not None:
            try:
                self.each(lambda control: control.destroy_weights_update_group(self.group_name))
            except UserError:
                pass
            finally:
                dist.destroy_process_group(self._group)
                self._group = None
        for control in self.controls:
            control.close()

    def _join(self) -> dist.ProcessGroup:
        if self._group is None:
            self._group = self._form_group()
        return self._group

    def _form_group(self) -> dist.ProcessGroup:
        world_size, backend = 1 + sum(self.workers), platform.backend()
        addresses = [local_address(control.base_url) for control in self.controls]
        # A server on this machine reaches any address of it, one elsewhere all but the loopback.
        address = next((address for address in addresses if not address.startswith("127.")), addresses[0])
        store = dist.TCPStore(address, 0, world_size, is_master=True, wait_for_workers=False, timeout=TIMEOUT)

        def join() -> dist.ProcessGroup:
            try:
                return join_group(store, world_size=world_size, name=self.group_name, backend=backend)
            except RuntimeError as error:  # torch.distributed
                raise UserError(f"{self.urls}: no process group for weights: {error}") from error

        def invite(control: SGLangControl) -> None:
            offset = 1 + sum(self.workers[: self.controls.index(control)])
            control.init_weights_update_group(address, store.port, offset, world_size, self.group_name, backend)

        joined = _in_thread(join)  # each side waits for the other
        self.each(invite)
        return joined.result()


def _in_thread[T](work: Callable[[], T]) -> Future[T]:
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="weight-sync").start()
    return result


def _first_failure[T](results: Sequence[Future[T]]) -> list[T]:
    done = futures.wait(results, return_when=futures.FIRST_EXCEPTION).done
    for result in done:
        result.result()
    return [result.result() for result in results]
