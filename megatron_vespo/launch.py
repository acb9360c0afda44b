"""One command on one node: ``python -m megatron_vespo.launch --ranks N CONFIG [section.key=value ...]``.

Checks the configuration, then starts the ranks with torchrun's own engine. The SGLang server, where the run starts one,
is a child of rank 0. On several nodes call torchrun itself with ``-m megatron_vespo.train``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vespo.checks import check_config, check_run_folder
from megatron_vespo.config_file import load_config
from megatron_vespo.errors import UserError
from megatron_vespo.train import make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Launch a run.

    Returns:
        Exit status: 0, or that of the rank that failed first.
    """
    parser = make_parser("python -m megatron_vespo.launch")
    parser.add_argument("--ranks", type=int, default=1, help="trainer processes on this node (GPUs, on a GPU node)")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        check_config(config, options.ranks)
        check_run_folder(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    failure = launch_ranks(options.ranks, ["-m", "megatron_vespo.train", options.config, *options.overrides])
    if failure is None:
        return 0
    rank, status = failure
    print(f"rank {rank} failed with exit status {status}", file=sys.stderr)  # noqa: T201
    return status if status > 0 else 1


def launch_ranks(ranks: int, arguments: Sequence[str], log_folder: Path | None = None) -> tuple[int, int] | None:
    """Run ``python ARGUMENTS`` on ranks of this node, by torchrun's own engine, and wait for them.

    Args:
        ranks: Number of processes.
        arguments: Command line of each, after the interpreter.
        log_folder: Keeps what the ranks print, as ``*/*/<rank>/stdout.log`` and ``stderr.log``; default: it is shown.

    Returns:
        None, or the rank that failed first and its exit status.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlaps rely on the order of launches
    # The failing rank has said what is wrong; the agent's own report repeats it as a page of traceback.
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="megatron_vespo",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(
            log_dir=None if log_folder is None else str(log_folder),
            redirects=Std.NONE if log_folder is None else Std.ALL,
        ),
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return rank, failure.exitcode
    return None


if __name__ == "__main__":
    sys.exit(main())
