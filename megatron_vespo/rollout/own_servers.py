"""The SGLang servers that this process starts on its node, and where those of the other nodes are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_vespo.config import Config, ServerSection
from megatron_vespo.errors import UserError
from megatron_vespo.gpus import cuda_visible_devices
from megatron_vespo.rollout.addresses import address_towards
from megatron_vespo.rollout.gate import StartGate
from megatron_vespo.rollout.keys import server_key
from megatron_vespo.rollout.placement import Node, server_devices
from megatron_vespo.rollout.served_model import served_arguments, served_model
from megatron_vespo.rollout.server import ANY_ADDRESS, PORT_STRIDE, SGLangServer, free_port

WATCH_SECONDS = 0.25


class OwnServers:
    """Servers that live as long as this process at most.

    Args:
        servers: Those that this process starts; none on most ranks.

    Attributes:
        here: Those, by address.
        urls: Addresses of the servers of all nodes, node by node, once somebody has gathered them.
        gate: Passed by whoever starts one of them again.
    """

    def __init__(self, servers: Sequence[SGLangServer] = ()) -> None:
        self.here = {server.url: server for server in servers}
        self.urls = list(self.here)
        self.gate = StartGate()

    @property
    def api_key(self) -> str | None:
        """The key of all of them, if they have one."""
        return next((server.api_key for server in self.here.values()), None)

    def wait_ready(self) -> None:
        """Wait until those of this process take requests.

        Raises:
            UserError: One died or took too long; holds the last lines of its log.
        """
        for server in self.here.values():
            server.wait_ready()

    def supervise(self, section: ServerSection, stack: ExitStack, announce: Callable[[str], None]) -> Supervisor:
        """From now on start those of this process again when they die, until the stack is unwound."""
        supervisor = Supervisor(
            list(self.here.values()),
            max_restarts=section.max_restarts,
            proof=section.startup_timeout,
            announce=announce,
            gate=self.gate,
        )
        stack.callback(supervisor.close)
        supervisor.start()
        return supervisor

    def move_logs(self, folder: Path) -> None:
        """Put the logs into the run's own folder, which need not have been there when the servers were started."""
        for server in self.here.values():
            server.move_log(folder / server.log_file.name.removeprefix(_log_prefix(folder.parent)))

    def __enter__(self) -> Self:
        try:
            for server in self.here.values():
                server.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End them all at once."""
        if self.here:
            with ThreadPoolExecutor(len(self.here)) as pool:
                list(pool.map(SGLangServer.stop, self.here.values()))


class Supervisor:
    """Starts servers of this process again when they die, until it is closed.

    For servers that nobody else here watches: on nodes without rank 0, which sees them go and come back, and where only
    servers run. One that hangs is not noticed.

    Args:
        servers: They are ready.
        max_restarts: Restarts in a row that none of a server's lives outlasts by ``proof`` seconds.
        proof: So long must a server run for its earlier restarts to be forgiven.
        announce: Told what people should know; called in the threads that watch.
        gate: When servers may be started.
    """

    def __init__(
        self,
        servers: Sequence[SGLangServer],
        *,
        max_restarts: int,
        proof: float,
        announce: Callable[[str], None],
        gate: StartGate | None = None,
    ) -> None:
        self._max_restarts, self._proof, self._announce = max_restarts, proof, announce
        self._gate = gate or StartGate()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, args=(server,), name="server-supervisor", daemon=True)
            for server in servers
        ]

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop watching. A restart under way is not waited for."""
        self._ended.set()

    @property
    def gave_up(self) -> bool:
        """Whether all servers are gone for good."""
        return not any(thread.is_alive() for thread in self._threads)

    def _keep(self, server: SGLangServer) -> None:
        restarts, since = 0, time.monotonic()
        while not self._ended.wait(WATCH_SECONDS):
            if server.is_alive:
                continue
            if time.monotonic() - since > self._proof:
                restarts = 0
            if restarts >= self._max_restarts:
                self._announce(
                    f"the SGLang server at {server.url} died again after {restarts} restarts"
                    f" (rollout.server.max_restarts) and is left so; {server.log_tail()}"
                )
                return
            restarts += 1
            self._announce(f"the SGLang server at {server.url} died; starting it again; {server.log_tail()}")
            try:
                with self._gate.starting():
                    server.restart()
            except UserError as error:
                if not self._ended.is_set():
                    self._announce(str(error))
            else:
                self._announce(f"the SGLang server at {server.url} is back")
            since = time.monotonic()


def servers_of_node(config: Config, node: Node, find_address: Callable[[str], str] = address_towards) -> OwnServers:
    """The servers that the run starts on this node, not started yet.

    Args:
        config: Configuration.
        node: This node.
        find_address: Says under which address the machine of another one reaches this one.

    Raises:
        UserError: No free port, no way to the other nodes, or no key where one is named.
    """
    logs, count = config.run_folder / "logs", config.placement.servers_per_node
    devices = server_devices(config, node.ranks)
    names = [log_name(config, node, k) for k in range(count)]
    if node.number > 0:
        # Rank 0 may not have made the run's folder yet, or may be about to empty it.
        logs, names = config.run_folder.parent, [f"{_log_prefix(config.run_folder)}{name}" for name in names]
    address = None
    if node.is_reached_from_others and config.rollout.server.host == ANY_ADDRESS:
        address = find_address(node.meeting_point)
    seed = config.run.seed + node.number * count
    return OwnServers(make_servers(config, devices, [logs / name for name in names], seed, address))


def log_name(config: Config, node: Node, number: int) -> str:
    """Name of the log of one server of a node in the run's ``logs``."""
    alone = node.count == 1 and config.placement.servers_per_node == 1
    return "sglang.log" if alone else f"sglang_{node.number}_{number}.log"


def _log_prefix(run_folder: Path) -> str:
    return f".{run_folder.name}."


def make_servers(
    config: Config, devices: Sequence[range], logs: Sequence[Path], first_seed: int, address: str | None
) -> list[SGLangServer]:
    """Servers as the configuration wants them.

    Args:
        config: Configuration.
        devices: Device numbers of each.
        logs: Log file of each.
        first_seed: Seed of the first one's sampler; the others count on from it, or equal prompts would get equal
            responses from all.
        address: Where other machines reach them; None: they need not.
    """
    section, key, ports = config.rollout.server, server_key(config.rollout.server), list[int]()
    model, arguments = served_model(config), served_arguments(config)
    servers = []
    for k, (own, log) in enumerate(zip(devices, logs, strict=True)):
        ports.append(free_port(section.host, ports) if section.port is None else section.port + k * PORT_STRIDE)
        servers.append(
            SGLangServer(
                model,
                log,
                device=section.device,
                host=section.host,
                port=ports[-1],
                random_seed=first_seed + k,
                args={"enable_return_routed_experts": config.health.router_flips} | arguments | config.sglang,
                environment={"CUDA_VISIBLE_DEVICES": cuda_visible_devices(own)} if section.device == "cuda" else None,
                python=section.python,
                startup_timeout=section.startup_timeout,
                api_key=key,
                address=address,
            )
        )
    return servers
