"""Time and memory of log-probabilities at a vocabulary of 151,936 against the bare matrix products.

python -m benchmarks.gpu.head [--rows 16384]

The ways are those of ``benchmarks/logprobs.py``. The aim: forward and backward within 1.2 of the products' own time,
and beside the hidden gradient and the weight gradient no more memory than a tile or two of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.gpu.measure import Setting, free_memory, milliseconds, peak_bytes
from benchmarks.gpu.report import Report
from benchmarks.gpu.script import run
from benchmarks.logprobs import Case, check_both_agree, forward_only, make_case, make_floor, ours, plain
from megatron_vespo.policy import tiles

SIZES = (16384, 2048, 151936)
"""Rows, hidden size, vocabulary."""
TINY = (24, 32, 640)


def measure(setting: Setting, report: Report, rows: int | None = None) -> None:
    """Fill the report."""
    torch.manual_seed(0)
    if setting.on_gpu:
        with report.attempt("agreement with log_softmax"):  # where all logits fit several times over
            check_both_agree(make_case(256, SIZES[1], SIZES[2], torch.bfloat16, setting.device))
        free_memory(setting)
    default, hidden, vocabulary = TINY if setting.tiny else SIZES
    case = make_case(rows or default, hidden, vocabulary, torch.bfloat16, setting.device)
    size = len(case.hidden)
    floor = make_floor(case)
    ways: dict[str, Callable[[], object]] = {
        "ours": partial(ours, case, size),
        "ours, half trained": partial(ours, case, size // 2),
        "ours, forward only": partial(forward_only, case),
    }
    everything = milliseconds(setting, {"floor": floor} | {name: fresh(case, way) for name, way in ways.items()})
    floor_time = everything["floor"]
    products = 4 * 2 * size * hidden * vocabulary
    report.add("four bare products", None, floor_time, 1.0, products / floor_time / 1e9, None)
    del floor
    free_memory(setting)
    for name, way in ways.items():
        report.add(
            name,
            _width(setting, case),
            everything[name],
            everything[name] / floor_time,
            None,
            _beside(setting, case, way),
        )
    for factor in (0.5, 2.0):
        with report.attempt(f"tiles of {factor} times the size"), _tiles_times(setting, factor):
            way = ways["ours"]
            found = milliseconds(setting, {"ours": fresh(case, way)})["ours"]
            report.add("ours", _width(setting, case), found, found / floor_time, None, _beside(setting, case, way))
    with report.attempt("log_softmax of all logits"):
        found = milliseconds(setting, {"plain": fresh(case, partial(plain, case))})["plain"]
        report.add(
            "log_softmax of all logits",
            None,
            found,
            found / floor_time,
            None,
            _beside(setting, case, partial(plain, case)),
        )


def fresh(case: Case, way: Callable[[], object]) -> Callable[[], object]:
    """The way, without gradients to add to."""

    def work() -> object:
        case.hidden.grad = case.weight.grad = None
        return way()

    return work


def _beside(setting: Setting, case: Case, way: Callable[[], object]) -> float:
    """MiB beyond inputs and weight gradient, at the most; the hidden gradient is among them."""
    case.hidden.grad = case.weight.grad = None
    free_memory(setting)
    peak = peak_bytes(setting, way)
    return (peak - (0 if case.weight.grad is None else case.weight.nbytes)) / 2**20


def _width(setting: Setting, case: Case) -> int:
    return tiles.width(setting.device, len(case.hidden), len(case.weight))


@contextmanager
def _tiles_times(setting: Setting, factor: float) -> Iterator[None]:
    kind = setting.device.type
    size = tiles.SIZES[kind]
    tiles.SIZES[kind] = tiles.TileSize(int(size.elements * factor), 1)
    try:
        yield
    finally:
        tiles.SIZES[kind] = size


def new_report(path: str | None = None) -> Report:
    """The empty table."""
    return Report(
        "Log-probabilities, vocabulary 151,936, 16,384 tokens, hidden 2,048, bf16",
        ("way", "tile width", "ms", "/ products", "TFLOP/s", "beside MiB"),
        "Aim: forward and backward within 1.2 of the four products. Half trained has a floor of five eighths of them,"
        " forward only of a quarter. Beside: beyond inputs and weight gradient.",
        path=path,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it."""
    return run(__doc__, arguments, new_report, measure, rows=None)


if __name__ == "__main__":
    raise SystemExit(main())
