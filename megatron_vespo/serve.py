"""Only the SGLang servers of one node: ``python -m megatron_vespo.serve CONFIG [section.key=value ...]``.

For nodes without trainer ranks, or a job beside the trainer's. Starts ``placement.servers_per_node`` servers on the
devices of this node from 0 on, waits until they are ready, writes their addresses for ``rollout.server.url_file`` of a
trainer, starts again what dies, and ends at SIGTERM or SIGINT.
"""

from __future__ import annotations

import signal
import socket
import sys
import threading
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_vespo.checks import check_servers
from megatron_vespo.config import Config, ServerSection
from megatron_vespo.config_file import load_config
from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_write
from megatron_vespo.rollout.addresses import address_towards
from megatron_vespo.rollout.keys import is_loopback
from megatron_vespo.rollout.own_servers import OwnServers, make_servers
from megatron_vespo.rollout.placement import Node, check_gpus, describe_servers, server_devices
from megatron_vespo.rollout.server import ANY_ADDRESS
from megatron_vespo.train import make_parser

# Of a network that documents use (RFC 5737): the way there is the way to other machines. Nothing is sent.
_ELSEWHERE = "192.0.2.1"
_WATCH_SECONDS = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until somebody says stop.

    Returns:
        Exit status: 0 after SIGTERM or SIGINT, or 1 after an error.
    """
    parser = make_parser("python -m megatron_vespo.serve", __doc__.splitlines()[0])
    parser.add_argument(
        "--url-file",
        metavar="FILE",
        help="where the addresses go, one a line; into a folder (FOLDER/ makes it): in a file of this host's name, gone"
        " at the end; default: rollout.server.url_file",
    )
    options = parser.parse_intermixed_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        config = load_config(options.config, options.overrides)
        url_file = options.url_file or config.rollout.server.url_file
        if url_file is None:
            raise UserError("--url-file: missing, and so is rollout.server.url_file; name where the addresses shall go")
        serve(config, _make_folder(url_file), stop)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    return 0


def serve(config: Config, url_file: Path, stop: threading.Event) -> None:
    """Run this node's servers.

    Args:
        config: Configuration of the run that samples from them; ``rollout.server`` says how, not where they are.
        url_file: File or folder for their addresses.
        stop: Ends it.

    Raises:
        UserError: Something is wrong with the configuration, a server does not start, or all of them are gone for good.
    """
    node = Node(ranks=0)
    config = _as_own(config)
    check_servers(config, node)
    check_gpus(config, node)
    host = socket.gethostname()
    own = _make_servers(config, node, host)
    with ExitStack() as stack:
        stack.enter_context(own)
        _say(f"{describe_servers(config, node)}: starting; logs: {_logs(config)}")
        if not _wait_ready(own, stop):
            return
        path = url_file / f"{host}.txt" if url_file.is_dir() else url_file
        _write_addresses(path, own.urls)
        if path != url_file:  # the other hosts' files stay
            stack.callback(path.unlink, missing_ok=True)
        _say(f"ready: {' '.join(own.urls)}, as {path} says")
        supervisor = own.supervise(config.rollout.server, stack, _say)
        while not stop.wait(_WATCH_SECONDS):
            if supervisor.gave_up:
                raise UserError("no server is left")
        _say("stopping")


def _as_own(config: Config) -> Config:
    """The configuration with the servers started here, wherever the trainer finds them."""
    fields = config.rollout.server.model_dump() | dict.fromkeys(("url", "url_file", "router"))
    section = ServerSection(**fields)
    if not is_loopback(section.host) and section.api_key_env is None:
        raise UserError(
            f"rollout.server.api_key_env: missing: others reach servers at {section.host}, and need their API key; name"
            " an environment variable that holds one here and where the trainer runs"
        )
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"server": section})})


def _make_servers(config: Config, node: Node, host: str) -> OwnServers:
    devices = server_devices(config, node.ranks)
    address = None
    if config.rollout.server.host == ANY_ADDRESS:
        try:
            address = address_towards(_ELSEWHERE)
        except UserError as error:
            raise UserError(
                f"rollout.server.host={ANY_ADDRESS}: this machine has no way to others; set the address of it that the"
                " trainer reaches"
            ) from error
    logs = [_logs(config) / f"sglang_{host}_{k}.log" for k in range(len(devices))]
    # Every host draws other samples for one prompt.
    seed = config.run.seed + zlib.crc32(host.encode()) % 2**20
    return OwnServers(make_servers(config, devices, logs, seed, address))


def _logs(config: Config) -> Path:
    """Beside the run's folder, which the trainer makes and may empty."""
    return config.run_folder.with_name(f"{config.run_folder.name}.servers")


def _wait_ready(own: OwnServers, stop: threading.Event) -> bool:
    """Wait in a thread, so that a signal is heard; False if it came first."""
    failures: list[UserError] = []

    def wait() -> None:
        try:
            own.wait_ready()
        except UserError as error:
            failures.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    while waiting.is_alive() and not stop.is_set():
        waiting.join(_WATCH_SECONDS)
    if failures and not stop.is_set():
        raise failures[0]
    return not stop.is_set()


def _make_folder(url_file: str) -> Path:
    """The path, made where it is said to be a folder, or else the folder that it lies in."""
    path = Path(url_file)
    folder = path if url_file.endswith("/") else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--url-file: {folder} cannot be made: {error.strerror or error}") from error
    return path


def _write_addresses(path: Path, urls: Sequence[str]) -> None:
    try:
        atomic_write(path, "".join(f"{url}\n" for url in urls))
    except OSError as error:
        raise UserError(f"--url-file: {path} cannot be written: {error.strerror or error}") from error


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
