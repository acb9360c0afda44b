"""An SGLang server as a child process.

Importing this module costs no torch and no SGLang, so that a trainer starts the server first and does its own slow
imports meanwhile.
"""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from megatron_vespo.errors import UserError
from megatron_vespo.guard import guarded
from megatron_vespo.rollout.serve_with_key import KEY_VARIABLE
from megatron_vespo.rollout.server_args import DEVICES, build_command, build_environment
from megatron_vespo.rollout.server_args import validate_server_args as validate_server_args

POLL_SECONDS = 0.1
# Below Linux's ephemeral range: a port found free there is not taken by a connection while the server imports.
FREE_PORTS = range(20000, 32000)
# Between the ports of two servers: with data-parallel attention SGLang takes the 7 ports from port + 233 on, too.
PORT_STRIDE = 10
ANY_ADDRESS = "0.0.0.0"

LOG_TAIL_LINES = 15
LOG_LINE_LENGTH = 300
# Lines that say nothing about a failure: requests served, progress bars, the dump of all arguments, the usage text.
_LOG_NOISE = re.compile(
    r"INFO: +[\d.]+:\d+ - |\d+%\||server_args=|Completed \||Triton is not supported|^\s*[\^~]+\s*$|^usage:|^\s+\[-"
)


class SGLangServer:
    """One SGLang server that lives as long as this process at most.

    A rollout server holds nothing worth saving, so it gets ``stop_grace`` seconds to end by itself and is then killed.

    Args:
        model_path: Hugging Face model folder.
        log_file: Where the output of the server goes; it is appended to.
        device: ``cpu`` or ``cuda``; ``cpu`` needs megatron_vespo installed beside SGLang, for its plugin.
        host: Address it listens on.
        port: None chooses a free one.
        random_seed: Seed of its sampler.
        args: More of SGLang's server arguments under their own names.
        environment: More environment variables for it, such as CUDA_VISIBLE_DEVICES.
        python: Interpreter that has SGLang; None means ours.
        startup_timeout: Seconds until it must answer.
        stop_grace: Seconds between SIGTERM and SIGKILL.
        api_key: Requests must carry it. Neither its command line nor its log shows it.
        address: Where clients reach it; default: ``host``, or 127.0.0.1 if that means all addresses.

    Attributes:
        command: Its command line, without the guard's.
        environment: All of its environment variables, the API key among them.

    Raises:
        UserError: an unknown device, a reserved argument, no model at ``model_path``.
    """

    def __init__(
        self,
        model_path: Path | str,
        log_file: Path | str,
        *,
        device: str = "cpu",
        host: str = "127.0.0.1",
        port: int | None = None,
        random_seed: int = 0,
        args: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        python: str | None = None,
        startup_timeout: float = 600.0,
        stop_grace: float = 2.0,
        api_key: str | None = None,
        address: str | None = None,
    ) -> None:
        if device not in DEVICES:
            raise UserError(f"device of the SGLang server: {device!r} is not one of {', '.join(DEVICES)}")
        self.model_path = Path(model_path)
        self.log_file = Path(log_file)
        self.host = host
        self.port = free_port(host) if port is None else port
        self.address = address or ("127.0.0.1" if host == ANY_ADDRESS else host)
        self.api_key = api_key
        self._startup_timeout = startup_timeout
        self._stop_grace = stop_grace
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._log_start = 0
        self.command = build_command(
            python or sys.executable,
            self.model_path,
            device,
            host,
            self.port,
            random_seed,
            args or {},
            keyed=api_key is not None,
        )
        secret = {} if api_key is None else {KEY_VARIABLE: api_key}
        self.environment = build_environment(self.model_path, device, {**(environment or {}), **secret})

    @property
    def url(self) -> str:
        """Base address, for clients."""
        return f"http://{self.address}:{self.port}"

    def start(self) -> None:
        """Start the process and return at once.

        Raises:
            UserError: the port is taken.
        """
        if self._process is not None:
            raise RuntimeError(f"the server at {self.url} was started already")
        if not _port_is_free(self.host, self.port):
            raise UserError(f"port {self.port} on {self.host} is taken: choose another, or none to get a free one")
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                guarded(self.command, self._stop_grace),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,  # Ctrl-C at the terminal is for the trainer, which then stops us in order
            )
        self._started_at = time.monotonic()

    def wait_ready(self) -> None:
        """Wait until the server takes requests.

        Raises:
            UserError: it died or took too long; holds the last lines of its log. It is stopped then.
        """
        while not self._answers():
            self.check_alive()
            if time.monotonic() - self._started_at > self._startup_timeout:
                tail = self.log_tail()
                self.stop()
                raise UserError(f"the SGLang server at {self.url} was not ready in {self._startup_timeout:g} s; {tail}")
            time.sleep(POLL_SECONDS)

    @property
    def pid(self) -> int | None:
        """Process id of the guard, which leads the session of all the server's processes; None if not started."""
        return None if self._process is None else self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs. Says nothing about whether it answers."""
        return self._process is not None and self._process.poll() is None

    def check_alive(self) -> None:
        """Raise a UserError with the log's last lines if the process is dead."""
        if not self.is_alive:
            status = "was not started" if self._process is None else f"ended with status {self._process.returncode}"
            raise UserError(f"the SGLang server at {self.url} {status}; {self.log_tail()}")

    def stop(self) -> None:
        """End the server and wait until all of its processes are gone. Does nothing if it does not run."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        # The guard returns once it has reaped every process below it.
        self._process.wait()
        self._process = None

    def restart(self) -> None:
        """Stop it, start it again at the same address, and wait until it is ready. It has its first weights again."""
        self.stop()
        self.start()
        self.wait_ready()

    def move_log(self, path: Path) -> None:
        """Rename the log, within one file system; a running server goes on writing to it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.log_file = self.log_file.rename(path)

    def log_tail(self) -> str:
        """The log's path and its last meaningful lines since the last start, for error messages."""
        if not self.log_file.is_file():
            return f"log: {self.log_file}"
        with self.log_file.open("rb") as log:
            log.seek(self._log_start)
            lines = log.read().decode(errors="replace").splitlines()
        telling = [line[:LOG_LINE_LENGTH] for line in lines if line.strip() and not _LOG_NOISE.search(line)]
        return "\n  ".join([f"the end of its log, {self.log_file}:", *telling[-LOG_TAIL_LINES:]])

    def _answers(self) -> bool:
        try:
            # trust_env: a proxy in the environment is not for our own server.
            return httpx.get(f"{self.url}/ready", timeout=5.0, trust_env=False).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _port_is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the server itself does: connections of a former server that linger in TIME_WAIT do no harm.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(host: str, taken: Collection[int] = ()) -> int:
    """A port that is free on an address of this machine, far enough from those that other servers will take.

    Raises:
        UserError: There is none.
    """
    # A generator of its own: the run's seed must not make two servers try the same ports.
    candidates = random.SystemRandom().sample(FREE_PORTS, k=100)
    for port in candidates:
        if all(abs(port - other) >= PORT_STRIDE for other in taken) and _port_is_free(host, port):
            return port
    raise UserError(
        f"found no free port on {host} between {FREE_PORTS.start} and {FREE_PORTS.stop}: is that our address?"
    )
