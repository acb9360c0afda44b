"""The comparison as a table, for a terminal, for a document and for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_vespo.layouts.compare import QUANTITIES, Row
from megatron_vespo.layouts.run import Comparison, verdict

_ON_POLICY = 1e-3  # |log W| below which phi is 1 to three digits, whatever its formula
_NEAR_TIE = 1e-5  # router probabilities this near may be told apart otherwise in float32


def _cells(row: Row) -> list[str]:
    """One line of the table."""
    size = [row.layout.name, str(row.layout.ranks)]
    if row.error:
        return [*size, *["-"] * (2 + len(QUANTITIES)), verdict(row)]
    facts = [f"{row.facts['microbatches']:.0f}", f"{row.facts['lockstep_efficiency']:.2f}"]
    values = [f"{row.differences[key].value:.1e}" + ("!" if key in row.off else "") for key in QUANTITIES]
    return [*size, *facts, *values, verdict(row).split(":")[0]]


def _table(comparison: Comparison) -> list[list[str]]:
    headings = [quantity.heading for quantity in QUANTITIES.values()]
    tolerances = [f"{quantity.tolerance:.0e}" for quantity in QUANTITIES.values()]
    return [
        ["layout", "ranks", "micro", "lockstep", *headings, ""],
        ["tolerance", "", "", "", *tolerances, ""],
        *(_cells(row) for row in comparison.rows),
    ]


def as_text(comparison: Comparison) -> str:
    """For a terminal: what was compared, the table, and what is off."""
    table = _table(comparison)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (zip(line, widths, strict=True) for line in table)
    ]
    return "\n".join([*describe(comparison), "", *(line.rstrip() for line in lines), *_failures(comparison)])


def as_markdown(comparison: Comparison) -> str:
    """For a document."""
    table = _table(comparison)
    table.insert(1, ["---", *["---:"] * (len(table[0]) - 2), "---"])
    return "\n".join([*describe(comparison), "", *("| " + " | ".join(line) + " |" for line in table)]) + "\n"


def as_json(comparison: Comparison) -> str:
    """For a program; numbers that JSON does not know are strings."""
    reference = comparison.reference
    tree = {
        "reference": {"grad_norm": reference.grad_norm, "metrics": reference.metrics, **reference.facts},
        "tolerances": {key: quantity.tolerance for key, quantity in QUANTITIES.items()},
        "layouts": [_row_tree(row) for row in comparison.rows],
        "agrees": comparison.agrees,
    }
    return json.dumps(_finite(tree), indent=1) + "\n"


def _row_tree(row: Row) -> dict[str, Any]:
    return {
        "layout": row.layout.name,
        "ranks": row.layout.ranks,
        "seconds": round(row.seconds, 1),
        **row.facts,
        "differences": {key: {"value": found.value, "where": found.where} for key, found in row.differences.items()},
        "off": row.off,
        "error": row.error,
    }


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def describe(comparison: Comparison) -> list[str]:
    """What the batch and its update are like, by the reference: where they are trivial a comparison says little."""
    reference, samples = comparison.reference, comparison.samples
    lengths = [len(sample.response_ids) for sample in samples]
    log_w, phi, loss = (reference.column(name) for name in ("log_w", "phi", "loss"))
    lines = [
        f"{len(samples)} samples, responses of {min(lengths)} to {max(lengths)} tokens; log W from {log_w.min():.3g} to"
        f" {log_w.max():.3g} (mean |log W| {np.abs(log_w).mean():.3g}), phi from {phi.min():.3g} to {phi.max():.3g}",
        f"loss {loss.sum():.6g} (sum of the samples' |losses| {np.abs(loss).sum():.3g}), grad norm"
        f" {reference.grad_norm:.6g}, largest change of a weight {reference.facts['largest_change']:.3g}",
    ]
    gap = reference.facts["router_gap"]
    if math.isfinite(gap):
        lines.append(f"smallest gap between the probabilities of an expert chosen and one that was not: {gap:.1e}")
    return [*lines, *_notes(comparison)]


def _notes(comparison: Comparison) -> list[str]:
    reference = comparison.reference
    notes = []
    if np.abs(reference.column("log_w")).max() < _ON_POLICY:
        notes.append("note: the samples are on-policy, so every phi is 1; compare with weights some updates later")
    if reference.grad_norm == 0:
        notes.append("note: the gradient is 0 (are all rewards of each group equal?); loss and step compare nothing")
    if reference.facts["router_gap"] < _NEAR_TIE and not comparison.agrees:
        notes.append(
            "note: two experts are nearly tied for a token; a layout may choose the other one, and is off then"
        )
    return notes


def _failures(comparison: Comparison) -> Sequence[str]:
    """What is off and where, a line each."""
    lines = []
    for row in comparison.rows:
        if row.error:
            lines.append(f"{row.layout.name}: {row.error}")
        for key in row.off:
            if key == "step" and "weights" in row.off:
                continue  # the same once more
            quantity, found = QUANTITIES[key], row.differences[key]
            where = f", the most at {found.where}" if found.where else ""
            lines.append(
                f"{row.layout.name}: {quantity.heading} is off by {found.value:.2g} (tolerance"
                f" {quantity.tolerance:.0e}; {quantity.measure}){where}"
            )
    return ["", *lines] if lines else []
