"""One command on one node: ``python -m megatron_vespo.launch --ranks N CONFIG [section.key=value ...]``.

Checks the configuration, then starts the ranks with torchrun's own engine. The SGLang server, where the run starts one,
is a child of rank 0. On several nodes call torchrun itself with ``-m megatron_vespo.train``.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

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
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlaps rely on the order of launches
    return _launch(options.ranks, ["-m", "megatron_vespo.train", options.config, *options.overrides])


def _launch(ranks: int, arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

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
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} failed with exit status {failure.exitcode}", file=sys.stderr)  # noqa: T201
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
