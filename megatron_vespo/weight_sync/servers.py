"""The servers that get every push, and the process group that rank 0 forms with all of their workers."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from functools import partial
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_vespo import platform
from megatron_vespo.errors import UserError
from megatron_vespo.rendezvous import store_listening_on
from megatron_vespo.rollout.addresses import address_towards
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.fleet import Member, State
from megatron_vespo.rollout.protocol import ServerGoneError
from megatron_vespo.sglang_weights import LOADER
from megatron_vespo.sglang_weights.wire import Request

TIMEOUT = timedelta(minutes=10)


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
    """Does the same on all servers that get the push at once; on rank 0.

    One process group (gloo on CPU, NCCL on GPU) holds rank 0 and the workers of all servers, formed when it is first
    needed, and anew when other servers, or other lives of the same, are chosen: what rank 0 broadcasts reaches every
    server in one collective.
    """

    def __init__(self) -> None:
        self.controls: tuple[SGLangControl, ...] = ()
        self.workers: tuple[int, ...] = ()
        self.group_name = ""
        self._members: list[Member] = []
        self._lives: list[tuple[str, int]] = []
        self._group: dist.ProcessGroup | None = None

    def choose(self, members: Sequence[Member]) -> None:
        """These servers get the next push."""
        lives = [(member.url, member.lives) for member in members]
        if lives == self._lives and self.group_name:
            return
        self.leave()
        self._members, self._lives = list(members), lives
        self.controls = tuple(member.control for member in members)
        # Processes of each that hold weights.
        self.workers = tuple(member.info.tensor_parallel_size for member in members if member.info is not None)
        self.group_name = f"megatron_vespo_{uuid.uuid4().hex[:12]}"
        self.abandon_update()  # of a trainer that died in the middle of a push

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
        self._finish(work)

    def gather(self, like: torch.Tensor, announce: Callable[[SGLangControl], None]) -> list[torch.Tensor]:
        """A tensor of the form of ``like`` from each worker, each server's tensors stacked: [workers, ...].

        Raises:
            UserError: As for :meth:`broadcast`.
        """
        parts = [torch.empty_like(like) for _ in range(1 + sum(self.workers))]
        work = dist.gather(like, parts, dst=0, group=self._join(), async_op=True)
        self.each(announce)
        self._finish(work)
        return list(torch.stack(parts[1:]).split(list(self.workers)))

    def load(self, control: SGLangControl, request: Request, version: int | None = None) -> None:
        """Have the workers of one server carry out a request; also for the ``announce`` of the collectives.

        Args:
            control: The server; it was started with our loader as ``custom_weight_loader``.
            request: What to do.
            version: Policy version of the weights afterwards; None leaves it as it is.
        """
        workers = self.workers[self.controls.index(control)]
        control.update_weights_with_loader(LOADER, [request.encode(worker) for worker in range(workers)], version)

    def leave(self) -> None:
        """Leave the group, which a server that is gone already has left."""
        if self._group is None:
            return
        group, self._group = self._group, None
        # Ours first: a server that still waits for a broadcast hears that it will not come.
        dist.destroy_process_group(group)
        name = self.group_name
        self._tell(lambda control: control.destroy_weights_update_group(name))

    def abandon_update(self) -> None:
        """Close the update that is open on those servers that answer: the next push opens another."""
        self._tell(SGLangControl.end_weight_update)

    def _tell(self, call: Callable[[SGLangControl], None]) -> None:
        """``call`` for every server, whose failures are none: who is gone has left, and has no update open.

        Only those that are not lost are waited for. One that hangs hears of it if ever it goes on.
        """
        told = [(member, _in_thread(partial(call, member.control))) for member in self._members]
        for member, result in told:
            if member.state is not State.GONE:
                with suppress(UserError):
                    result.result()

    def _finish(self, work: dist.Work | None) -> None:
        assert work is not None
        try:
            work.wait()
        except RuntimeError as error:  # torch.distributed, where a server's process ended
            raise ServerGoneError(f"{self.urls}: the connection for weights broke: {error}") from error

    def _join(self) -> dist.ProcessGroup:
        if self._group is None:
            self._group = self._form_group()
        return self._group

    def _form_group(self) -> dist.ProcessGroup:
        world_size, backend = 1 + sum(self.workers), platform.backend()
        urls = [urlsplit(control.base_url) for control in self.controls]
        addresses = [address_towards(url.hostname or "", url.port or 80) for url in urls]
        # A server on this machine reaches any address of it, one elsewhere all but the loopback.
        address = next((address for address in addresses if not address.startswith("127.")), addresses[0])
        store = store_listening_on(address, TIMEOUT, world_size)

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
