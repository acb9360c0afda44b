"""Entry point of every rank: ``torchrun --nproc-per-node N -m megatron_vespo.train CONFIG [section.key=value ...]``."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import ExitStack

from megatron_vespo import environment, guard
from megatron_vespo.checks import check_config, check_inputs, check_parallel_plan, describe_layout
from megatron_vespo.config import Config
from megatron_vespo.config.describe import describe_config
from megatron_vespo.config_file import dump_config, load_config
from megatron_vespo.errors import UserError
from megatron_vespo.logs import RankLog, report_once
from megatron_vespo.processes import a_local_rank_is_gone
from megatron_vespo.rollout.own_servers import OwnServers, servers_of_node
from megatron_vespo.rollout.placement import Node
from megatron_vespo.run_folder import check_run_folder, locked, prepare_run_folder, resume_step
from megatron_vespo.stopping import StopRequest, announce_stop

# Seconds that a rank gets to close what is open after an error. The others may hang in a collective with it meanwhile.
_UNWIND_SECONDS = 20


def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Command line of whatever is started with a configuration."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="Configuration, one YAML section each:\n" + describe_config(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of the file; YAML value")
    return parser


def make_run_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Command line of ``train`` and ``launch``."""
    parser = make_parser(program, description)
    parser.add_argument("--resume", metavar="auto|never|STEP", help="the same as run.resume=...")
    parser.add_argument("--preflight-only", action="store_true", help="the same as preflight.only=true")
    return parser


def all_overrides(options: argparse.Namespace) -> list[str]:
    """The overrides of a command line, those that have options of their own last, where they win."""
    own = [] if options.resume is None else [f"run.resume={options.resume}"]
    return [*options.overrides, *own, *(["preflight.only=true"] if options.preflight_only else [])]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank.

    Returns:
        Exit status: 0, also if the run was asked to stop and did so in order; or 1 after an error, which one rank
        prints.
    """
    parser = make_run_parser("python -m megatron_vespo.train", __doc__.splitlines()[0])
    options = parser.parse_intermixed_args(arguments)
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlaps rely on the order of launches
    main_rank = os.environ["RANK"] == "0"
    stop = StopRequest(announce_stop if main_rank else lambda: None)
    stop.install()
    if _under_agent():
        # The agent holds the job's key-value store: without it nothing goes on, and nobody would end us.
        guard.prctl(guard.PR_SET_PDEATHSIG, signal.SIGKILL)
    # SGLang turns this off in its workers unless it is set, and the members of an NCCL group must agree.
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    log = RankLog()
    with ExitStack() as stack:
        stack.callback(stop.uninstall)
        try:
            config = load_config(options.config, all_overrides(options))
            check_config(config, int(os.environ["WORLD_SIZE"]), Node.from_environment())
            check_inputs(config)
            if main_rank:
                check_run_folder(config)
                stack.enter_context(locked(config.run_folder))
                prepare_run_folder(config, dump_config(config))
        except UserError as error:
            if os.environ["LOCAL_RANK"] == "0":  # the others of this node find the same
                print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
            return 1
        try:
            run(config, log, stop)
        except Exception:  # noqa: BLE001 - it has been reported
            return 1
    return 0


def _under_agent() -> bool:
    """Whether torchrun or ``launch`` started this rank."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def run(config: Config, log: RankLog, stop: StopRequest) -> None:
    """Do what the configuration says, on one rank of the job; an error is reported before it goes on."""
    with ExitStack() as stack:
        try:
            _run(config, log, stop, stack)
        except BaseException as error:
            # Before the stack is unwound, which the others notice and fail of as well.
            if isinstance(error, Exception):
                _report(error, config, log)
            if _under_agent():
                _leave_within(_UNWIND_SECONDS)
            raise


def _report(error: Exception, config: Config, log: RankLog) -> None:
    """Tell of an error: with the traceback in the log of this rank, and on the console if it is the run's first one."""
    logs, who = config.run_folder / "logs", f"rank {os.environ['RANK']}"
    if isinstance(error, UserError):
        # Before the ranks have joined, all of a node find the same, and the folder may still be an earlier run's.
        if log.path is not None or os.environ["LOCAL_RANK"] == "0":
            report_once(logs, who, str(error))
        return
    logging.getLogger(__name__).error("this rank failed", exc_info=error)
    if not a_local_rank_is_gone():  # whoever started it says how it ended, and this error is what comes of it
        trace = "".join(traceback.format_exception(error)).rstrip()
        report_once(logs, who, f"{who} failed{f'; its log: {log.path}' if log.path else ''}\n{trace}")


def _leave_within(seconds: float) -> None:
    """End this process should closing what is open take longer, as it does where others are gone."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _run(config: Config, log: RankLog, stop: StopRequest, stack: ExitStack) -> None:
    warnings = environment.check_node(config)
    own = OwnServers()
    if os.environ["LOCAL_RANK"] == "0" and config.samples_from_server and config.rollout.server.is_own:
        # Before the slow imports: the servers do their own meanwhile.
        own = stack.enter_context(servers_of_node(config, Node.from_environment()))

    import torch  # noqa: F401 - its logger exists from here on

    log.adopt("torch")
    of_plan = check_parallel_plan(config, int(os.environ["WORLD_SIZE"]), Node.from_environment().ranks)
    if os.environ["RANK"] == "0":  # the others find the same
        warnings += of_plan
    if config.objective == "rollout":
        from megatron_vespo.rollout_only import generate

        log.write_to(config.run_folder / "logs" / "rank_0.log")
        environment.warn(warnings)
        generate(config, own, stack, stop)
        return
    from megatron_vespo.environment.cuda import check_torch

    check_torch()  # before Megatron is imported, in one way or the other
    from megatron_vespo import parallel
    from megatron_vespo.environment.ranks import check_ranks
    from megatron_vespo.training import train
    from megatron_vespo.watchdog import Watchdog

    # Collectives give up later than the watchdog, which says more.
    parallel.initialize(config.megatron, config.run.seed, timeout_minutes=config.run.stuck_timeout / 60 + 5)
    stack.callback(parallel.shutdown)
    # Only now: rank 0 made the run folder before it joined the others.
    logs = config.run_folder / "logs"
    log.write_to(logs / f"rank_{parallel.rank()}.log")
    own.move_logs(logs)
    check_ranks(config, warnings)
    own.urls = [url for urls in parallel.gather_values(own.urls, list[str]) for url in urls]
    watchdog = Watchdog(config.run.stuck_timeout, logs)
    watchdog.start()
    stack.callback(watchdog.stop)
    layout = describe_layout(config, parallel.world_size())
    train(config, own, stack, layout=layout, resume_after=resume_step(config), stop=stop, at=watchdog.at)


if __name__ == "__main__":
    sys.exit(main())
