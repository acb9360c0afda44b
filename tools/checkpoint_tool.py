"""What the checkpoint tools have in common: one-line errors, a progress bar, time and memory at the end."""

from __future__ import annotations

import argparse
import resource
import sys
import time
import warnings
from collections.abc import Callable

try:
    from tqdm import tqdm
except ImportError:  # comes with transformers, which a Megatron-only environment may lack
    tqdm = None


class Bar:
    """Progress of one tool, a bar for each of its stages; nothing where nobody is watching."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """So much of a stage is done."""
        if stage != self._stage:
            self.close()
            self._stage = stage
            if tqdm is not None:
                self._bar = tqdm(total=total, desc=stage, unit="B", unit_scale=True, disable=None)
            else:
                print(f"{stage} ...", file=sys.stderr, flush=True)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def run(parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace, Bar], str]) -> int:
    """Parse, act and report; the exit status. ``action`` returns what it did, as a phrase."""
    args = parser.parse_args()
    started = time.perf_counter()
    warnings.filterwarnings("ignore")
    # Slow to import, and --help needs none of it.
    from megatron_vespo import parallel
    from megatron_vespo.errors import UserError
    from megatron_vespo.models import convert  # noqa: F401 - so that it counts as an import

    imported, before = time.perf_counter(), _peak()
    bar = Bar()
    try:
        parallel.initialize_alone()
        did = action(args, bar)
    except UserError as error:
        bar.close()
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    bar.close()
    seconds, memory = time.perf_counter() - imported, (_peak() - before) / 2**20
    print(f"{did} in {seconds:.1f} s (imports {imported - started:.1f} s), peak memory {memory:.0f} MiB above imports")
    return 0


def _peak() -> int:
    """Most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """Options of both converters."""
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights written; default: as they are stored")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")
    parser.add_argument("--verify", action="store_true", help="read both folders again and compare them bit by bit")
    parser.add_argument("--verify-only", action="store_true", help="compare what an earlier call wrote; write nothing")


def size(text: str) -> int:
    """Bytes of ``500MB``, ``5GB`` or ``4GiB``."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    for unit, factor in units.items():
        number = text.upper().removesuffix(unit)
        if number != text.upper() and number.strip().isdigit() and int(number):
            return int(number) * factor
    raise argparse.ArgumentTypeError(f"{text!r} is no size; 5GB or 500MB would be")
