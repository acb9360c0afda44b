"""Entry point of every rank: ``torchrun --nproc-per-node N -m megatron_vespo.train CONFIG [section.key=value ...]``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType

from megatron_vespo.checks import check_config, describe_layout, prepare_run_folder
from megatron_vespo.config import Config
from megatron_vespo.config_file import describe_config, dump_config, load_config
from megatron_vespo.errors import UserError
from megatron_vespo.logs import RankLog
from megatron_vespo.rollout.server import SGLangServer


def make_parser(program: str) -> argparse.ArgumentParser:
    """Command line of ``train`` and ``launch``."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=__doc__.splitlines()[0],
        epilog="Configuration, one YAML section each:\n" + describe_config(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of the file; YAML value")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank.

    Returns:
        Exit status: 0, or 1 after an error that the user can mend, which is printed as one line.
    """
    options = make_parser("python -m megatron_vespo.train").parse_args(arguments)
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    signal.signal(signal.SIGTERM, _leave)
    log = RankLog()
    main_rank = os.environ["RANK"] == "0"
    try:
        config = load_config(options.config, options.overrides)
        check_config(config, int(os.environ["WORLD_SIZE"]))
        if main_rank:
            prepare_run_folder(config, dump_config(config))
    except UserError as error:
        if main_rank:  # the others find the same
            _print_error(error)
        return 1
    try:
        run(config, log)
    except UserError as error:
        _report(error, config)
        return 1
    return 0


def _leave(signum: int, frame: FrameType | None) -> None:
    """SIGTERM, from torchrun when another rank failed: unwind, so that the server is stopped."""
    raise SystemExit(128 + signum)


def _print_error(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201


def _report(error: UserError, config: Config) -> None:
    """Print the error once, though every rank may have it: by the rank that gets to create the error file."""
    try:
        with (config.run_folder / "logs" / "error.txt").open("x", encoding="utf-8") as file:
            file.write(f"rank {os.environ['RANK']}: {error}\n")
    except FileExistsError:
        return
    _print_error(error)


def run(config: Config, log: RankLog) -> None:
    """Do what the configuration says; on one rank of the job."""
    with ExitStack() as stack:
        server = None
        if os.environ["RANK"] == "0" and config.samples_from_server and not config.rollout.server.urls:
            # Before the slow imports: the server does its own meanwhile.
            server = stack.enter_context(start_server(config))

        import torch  # noqa: F401 - its logger exists from here on

        log.adopt("torch")
        if config.objective == "rollout":
            from megatron_vespo.rollout_only import generate

            log.write_to(config.run_folder / "logs" / "rank_0.log")
            generate(config, server, stack)
            return
        from megatron_vespo import parallel
        from megatron_vespo.training import train

        parallel.initialize(config.megatron, config.run.seed)
        stack.callback(parallel.shutdown)
        # Only now: rank 0 made the run folder before it joined the others.
        log.write_to(config.run_folder / "logs" / f"rank_{parallel.rank()}.log")
        train(config, server, stack, layout=describe_layout(config, parallel.world_size()))


def start_server(config: Config) -> SGLangServer:
    """The run's own SGLang server, not started yet."""
    server = config.rollout.server
    return SGLangServer(
        config.model.hf_path,
        config.run_folder / "logs" / "sglang.log",
        device=server.device,
        host=server.host,
        port=server.port,
        random_seed=config.run.seed,
        args=config.sglang,
        python=server.python,
        startup_timeout=server.startup_timeout,
    )


if __name__ == "__main__":
    sys.exit(main())
