"""How the ranks of one node find each other, without a port that other machines reach.

torch's key-value stores listen on every interface of a machine; whoever reaches one reads and writes what the ranks
agree on.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

LOOPBACK = "127.0.0.1"
BACKEND = "loopback"


def store_listening_on(address: str, timeout: timedelta, world_size: int | None = None) -> TCPStore:
    """A key-value store that this process keeps, on a free port of this one IPv4 address.

    Args:
        address: The address.
        timeout: Longest wait for a key.
        world_size: Number of processes that will use it, if that is known.
    """
    listener = socket.create_server((address, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


class LoopbackRendezvous(RendezvousHandler):
    """torchrun's rendezvous for one node, whose ranks share the agent's store."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._store = store_listening_on(LOOPBACK, timedelta(minutes=5))
        self._closed = False

    @property
    def use_agent_store(self) -> bool:
        """The store outlives the ranks."""
        return True

    def get_backend(self) -> str:
        """Name under which torchrun finds it."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """This node, alone."""
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._store.port))

    def is_closed(self) -> bool:
        """Whether it is over."""
        return self._closed

    def set_closed(self) -> None:
        """It is over."""
        self._closed = True

    def num_nodes_waiting(self) -> int:
        """No other node ever comes."""
        return 0

    def get_run_id(self) -> str:
        """Name of the job."""
        return self._run_id

    def shutdown(self) -> bool:
        """It is over; the store goes with the process."""
        self.set_closed()
        return True


def register() -> None:
    """Make it known to torchrun's engine under ``BACKEND``."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id)
