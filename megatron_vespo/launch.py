"""One command on one node: ``python -m megatron_vespo.launch --ranks N CONFIG [section.key=value ...]``.

Checks the configuration, then starts the ranks with torchrun's own engine. The SGLang server, where the run starts one,
is a child of rank 0. On several nodes call torchrun itself with ``-m megatron_vespo.train``.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from megatron_vespo.checks import check_config
from megatron_vespo.config import Config
from megatron_vespo.config_file import load_config
from megatron_vespo.errors import UserError
from megatron_vespo.logs import error_file, report_once, reporting_rank
from megatron_vespo.processes import children, how_it_ended
from megatron_vespo.rollout.keys import is_loopback
from megatron_vespo.run_folder import check_run_folder, refuse_if_locked
from megatron_vespo.stopping import StopRequest
from megatron_vespo.train import all_overrides, make_parser

if TYPE_CHECKING:  # torch is slow to import, and a wrong configuration is told before
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# What is likely behind a signal that nobody sent.
_HINTS: dict[int, str] = {
    signal.SIGKILL: "unless somebody sent that, the machine ran out of memory: see `dmesg`",
    signal.SIGSEGV: "a crash in compiled code: the log ends with the Python stack",
    signal.SIGABRT: "a failed check in compiled code: the log ends with the Python stack",
    signal.SIGBUS: "shared memory or the disk may be full: see `df -h /dev/shm`",
}

# Seconds that ranks get to leave when they are ended, before they are killed.
_SHUTDOWN_SECONDS = 10


class RankFailure(NamedTuple):
    """The rank that failed first, and its exit status; that of a rank killed by a signal is the signal's, negative."""

    rank: int
    status: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch a run.

    Returns:
        Exit status: 0, also if the run was asked to stop and did so in order; or that of the rank that failed first,
        128 and the signal's number if a signal ended it.
    """
    parser = make_parser("python -m megatron_vespo.launch")
    parser.add_argument("--ranks", type=int, default=1, help="trainer processes on this node (GPUs, on a GPU node)")
    options = parser.parse_intermixed_args(arguments)  # options may come between overrides
    overrides = all_overrides(options)
    stop = StopRequest(pass_on)
    stop.install()
    try:
        config = load_config(options.config, overrides)
        check_config(config, options.ranks)
        refuse_if_locked(config.run_folder)
        check_run_folder(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    # This attempt's error is still to come.
    error_file(config.run_folder / "logs").unlink(missing_ok=True)
    if _stays_on_this_machine(config):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rank_arguments = ["-m", "megatron_vespo.train", options.config, *overrides]
    failure = launch_ranks(options.ranks, rank_arguments, stop=stop)
    if failure is None:
        return 0
    _report(failure, config, stop)
    return failure.status if failure.status > 0 else 128 - failure.status


def _stays_on_this_machine(config: Config) -> bool:
    """Whether no process group has a member elsewhere: weights are broadcast to the servers."""
    server = config.rollout.server
    urls = server.urls if not server.is_own else [f"http://{server.host}"]
    return not config.samples_from_server or (
        bool(urls) and all(is_loopback(urlsplit(url).hostname or "") for url in urls)
    )


def pass_on() -> None:
    """Hand the first request to stop on to the ranks, which have sessions of their own."""
    ranks = children(os.getpid())
    if not ranks:
        raise SystemExit(128 + signal.SIGTERM)
    for pid in ranks:
        os.kill(pid, signal.SIGTERM)


def _report(failure: RankFailure, config: Config, stop: StopRequest) -> None:
    """Say how the first rank ended, and why, as far as it has not said so itself."""
    logs = config.run_folder / "logs"
    # Of ranks that fail in one second the engine does not know which was first, but that one has told.
    rank = reporting_rank(logs) if failure.status > 0 else None
    rank = failure.rank if rank is None else rank
    ended = f"rank {rank} {how_it_ended(failure.status)}"
    log = f"its log: {logs / f'rank_{rank}.log'}"
    if stop.requested and failure.status == 128 + signal.SIGTERM:
        print("stopped before the first step", file=sys.stderr)  # noqa: T201
    elif failure.status > 0:
        print(f"{ended}; {log}", file=sys.stderr)  # noqa: T201
    else:
        hint = _HINTS.get(-failure.status)
        message = "; ".join(part for part in (ended, hint, log) if part)
        if not report_once(logs, "launcher", message):
            print(ended, file=sys.stderr)  # noqa: T201


def launch_ranks(
    ranks: int, arguments: Sequence[str], log_folder: Path | None = None, stop: StopRequest | None = None
) -> RankFailure | None:
    """Run ``python ARGUMENTS`` on ranks of this node, by torchrun's own engine, and wait for them.

    Args:
        ranks: Number of processes.
        arguments: Command line of each, after the interpreter.
        log_folder: Keeps what the ranks print, as ``*/*/<rank>/stdout.log`` and ``stderr.log``; default: it is shown.
        stop: Handles the signals that ask to stop, and defers them from now on: the ranks get the time that they need.
            Default: the engine ends the ranks at such a signal, and kills them half a minute later.

    Returns:
        None, or the rank that failed first.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from megatron_vespo import rendezvous

    rendezvous.register()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlaps rely on the order of launches
    # The failing rank has said what is wrong; the agent's own report repeats it as a page of traceback.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="megatron_vespo",
        rdzv_backend=rendezvous.BACKEND,
        local_addr=rendezvous.LOOPBACK,
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(
            log_dir=None if log_folder is None else str(log_folder),
            redirects=Std.NONE if log_folder is None else Std.ALL,
        ),
    )
    if stop is not None:
        config.signals_to_handle = "SIGQUIT"
        config.shutdown_timeout = _SHUTDOWN_SECONDS
        stop.defer()
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return _first(error.failures)
    return None


def _first(failures: Mapping[int, ProcessFailure]) -> RankFailure:
    """The failure that others are consequences of.

    Their times are whole seconds, in which a rank that was killed has long broken the connections of others; so a rank
    that was killed comes before one that failed, and last come those that the engine ended itself, by SIGTERM.
    """

    def order(rank: int) -> tuple[int, int, int]:
        status = failures[rank].exitcode
        kind = 2 if status in (-signal.SIGTERM, 128 + signal.SIGTERM) else int(status > 0)
        return failures[rank].timestamp, kind, rank

    first = min(failures, key=order)
    return RankFailure(first, failures[first].exitcode)


if __name__ == "__main__":
    sys.exit(main())
