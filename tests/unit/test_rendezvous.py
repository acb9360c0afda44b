"""The store of a one-node job is reached from this machine alone, and works."""

import os
from datetime import timedelta

import psutil
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry

from megatron_vespo import rendezvous


def test_the_store_listens_on_the_loopback_alone() -> None:
    rendezvous.register()
    rendezvous.register()  # as every further launch in a process does
    parameters = RendezvousParameters(rendezvous.BACKEND, "", "job", 1, 1)
    handler = rendezvous_handler_registry.create_handler(parameters)
    info = handler.next_rendezvous()
    assert (info.rank, info.world_size, handler.use_agent_store) == (0, 1, True)
    where = info.bootstrap_store_info
    assert where is not None and where.master_addr == "127.0.0.1"
    listening = [c.laddr.ip for c in psutil.Process(os.getpid()).net_connections() if c.laddr.port == where.master_port]
    assert set(listening) == {"127.0.0.1"}
    client = TCPStore(where.master_addr, where.master_port, timeout=timedelta(seconds=10), wait_for_workers=False)
    client.set("key", "value")
    assert info.store.get("key") == b"value"
    assert not handler.is_closed() and handler.shutdown() and handler.is_closed()
