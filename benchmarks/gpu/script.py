"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.measure import Setting
from benchmarks.gpu.report import Report


def parser(description: str) -> argparse.ArgumentParser:
    """--device, --tiny, --repeats, --out."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--tiny", action="store_true", help="small sizes, to try the script without a GPU")
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--out", help="file for the table, as JSON")
    return options


def setting_of(options: argparse.Namespace) -> Setting:
    """Where and how large; on the GPU that torch calls the current one."""
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("no GPU: torch.cuda.is_available() is false; --device cpu --tiny tries the script without")
        device = torch.device("cuda", torch.cuda.current_device())
        return Setting(device, options.tiny, options.repeats)
    return Setting(torch.device("cpu"), options.tiny, repeats=1, warm_up=1)


def join(megatron: dict[str, Any] | None = None) -> None:
    """Be the only rank of a job, unless this process is in one."""
    from megatron_vespo import parallel

    if torch.distributed.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    parallel.initialize(megatron or {}, seed=1)


def finish(report: Report) -> int:
    """Keep the report and give the exit status."""
    report.save()
    return 1 if report.failures or not report.rows else 0


def run(
    description: str,
    arguments: Sequence[str] | None,
    new_report: Callable[[str | None], Report],
    measure: Callable[..., None],
    **sizes: int | None,
) -> int:
    """One benchmark from its command line to its exit status.

    Args:
        description: The script's docstring.
        arguments: Command line; None: this process's.
        new_report: Makes the empty table, to be kept in a file if one is named.
        measure: Fills it, given the setting and the table.
        **sizes: Options of its own, with their defaults; ``measure`` takes them by name.
    """
    options = parser(description)
    for name, default in sizes.items():
        options.add_argument(f"--{name}", type=int, default=default)
    parsed = options_of(options, arguments)
    setting, report = setting_of(parsed), new_report(parsed.out)
    join()
    measure(setting, report, **{name: vars(parsed)[name] for name in sizes})
    return finish(report)


def options_of(options: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and say what is run."""
    parsed = options.parse_args(arguments)
    print(f"{options.prog}: {parsed}", flush=True)
    return parsed
