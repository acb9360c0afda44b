"""One command on one node: ``python -m megatron_vespo.launch --ranks N CONFIG [section.key=value ...]``.

Checks the configuration, then starts the ranks with torchrun's own engine. The SGLang servers, where the run starts
some, are children of rank 0. On several nodes call torchrun itself with ``-m megatron_vespo.train``: the lines for each
node are what ``--dry-run --nodes N`` prints.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from megatron_vespo.checks import check_config, check_inputs, check_parallel_plan
from megatron_vespo.config import Config
from megatron_vespo.config_file import load_config
from megatron_vespo.dry_run import MEETING_POINT, describe_run
from megatron_vespo.environment import check_before_ranks
from megatron_vespo.errors import UserError
from megatron_vespo.logs import error_file, report_once, reporting_rank
from megatron_vespo.processes import children, how_it_ended
from megatron_vespo.rollout.keys import is_loopback
from megatron_vespo.rollout.placement import Node
from megatron_vespo.run_folder import check_run_folder, refuse_if_locked
from megatron_vespo.stopping import StopRequest
from megatron_vespo.train import all_overrides, make_run_parser

if TYPE_CHECKING:  # torch is slow to import, and a wrong configuration is told before
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# What is likely behind a signal that nobody sent.
_HINTS: dict[int, str] = {
    signal.SIGKILL: "unless somebody sent that, the machine ran out of memory: see `dmesg`",
    signal.SIGSEGV: "a crash in compiled code: the log ends with the Python stack",
    signal.SIGABRT: "a failed check in compiled code: the log ends with the Python stack",
    signal.SIGBUS: "shared memory or the disk may be full: see `df -h /dev/shm`",
}

# What ranks get unless it is set: {name: value}.
_RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Megatron's overlaps rely on the order of launches.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
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
    parser = make_run_parser("python -m megatron_vespo.launch", __doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1, help="trainer processes on this node (GPUs, on a GPU node)")
    parser.add_argument("--dry-run", action="store_true", help="check, and print the commands instead of running them")
    parser.add_argument("--nodes", type=int, default=1, help="with --dry-run: print torchrun's lines for so many nodes")
    options = parser.parse_intermixed_args(arguments)  # options may come between overrides
    overrides = all_overrides(options)
    stop = StopRequest(pass_on)
    stop.install()
    try:
        if options.nodes > 1 and not options.dry_run:
            raise UserError(
                "--nodes: the launcher starts the ranks of one node; --dry-run prints what to run on each of several"
            )
        config = load_config(options.config, overrides)
        node = Node(count=options.nodes, ranks=options.ranks)
        if options.nodes > 1:
            node = replace(node, meeting_point=MEETING_POINT)
        check_config(config, options.ranks * options.nodes, node)
        check_inputs(config)
        if not options.dry_run:
            check_before_ranks(config, options.ranks)
        check_parallel_plan(config, options.ranks * options.nodes, options.ranks)  # rank 0 tells its warnings
        refuse_if_locked(config.run_folder)
        check_run_folder(config)
        environment = rank_environment(config, node)
        rank_arguments = [options.config, *overrides]
        if options.dry_run:
            print(describe_run(config, rank_arguments, options.ranks, options.nodes, environment))  # noqa: T201
            return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    # This attempt's error is still to come.
    error_file(config.run_folder / "logs").unlink(missing_ok=True)
    os.environ.update(environment)
    failure = launch_ranks(options.ranks, ["-m", "megatron_vespo.train", *rank_arguments], stop=stop)
    if failure is None:
        return 0
    _report(failure, config, stop)
    return failure.status if failure.status > 0 else 128 - failure.status


def rank_environment(config: Config, node: Node) -> dict[str, str]:
    """Environment variables that the ranks of a node get unless they are set."""
    defaults = dict(_RANK_ENVIRONMENT)
    if node.count == 1 and _stays_on_this_machine(config):
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    return {name: value for name, value in defaults.items() if name not in os.environ}


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
    for name, value in _RANK_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
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
