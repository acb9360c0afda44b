"""The write-up of a sweep: tables, pictures, and one HTML page that holds them all."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from examples.staleness_lab.plots import save_curves, save_mismatches, save_summary
from examples.staleness_lab.settings import Grid
from examples.staleness_lab.tables import (
    FIGURES,
    Results,
    accuracies,
    details,
    read_results,
    setting_name,
    write_json,
    write_markdown,
)

_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #e5e5e5; text-align: left; white-space: nowrap; }
.wide { overflow-x: auto; font-size: 12px; } img { max-width: 100%; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1rem; }
"""

_HOW_TO_READ = """
<p>Every run starts from the same weights, a tiny mixture of experts that supervised training has made mediocre at
adding up eight digits modulo 5, and makes the same number of optimizer updates with the same training loop, policy and
loss as a real run. What differs is how stale the samples are: a rollout batch of N minibatches is sampled at once and
then trained on in N updates, so that the last one learns from samples that are N - 1 updates old.</p>
<dl>
<dt>N</dt><dd>Minibatches per rollout batch. 1 is on-policy.</dd>
<dt>log W</dt><dd>log pi(response) - log mu(response): how much likelier the response has become since it was sampled,
by the distribution that it was really sampled from. 0 is on-policy.</dd>
<dt>kappa</dt><dd>The weight a method puts on the gradient of a token (phi(W) in VESPO, 0 for what is clipped, 1 in
REINFORCE), its mean over the tokens of a sample.</dd>
<dt>ESS</dt><dd>Effective sample size divided by the number of samples: 1 where all weights are equal, 1/samples where
one sample has all the weight.</dd>
<dt>collapsed</dt><dd>The run ended with less than half of its best accuracy, or below where it began.</dd>
<dt>frozen</dt><dd>More than 90 % of the samples of the last 16 updates had kappa &lt; 0.1: nothing is heard.</dd>
<dt>diverged</dt><dd>Gradients or log-probabilities became NaN or infinite; counts as accuracy 0.</dd>
</dl>
<p>Accuracy is measured on held-out prompts with the trainer's weights and an exact sampler, whatever the mismatch.
Lines are means over seeds, bands go from the lowest seed to the highest; three seeds say little about small
differences.</p>
"""


def write_up(grid: Grid, folder: Path) -> None:
    """Write ``table.md``, ``table.json``, the pictures and ``index.html`` of what has been run; nothing where none has.

    Args:
        grid: The sweep.
        folder: Its folder.
    """
    results = read_results(grid, folder)
    if not results.outcomes:
        return
    write_json(results, folder / "table.json")
    write_markdown(results, folder / "table.md")
    save_summary(results, folder / "summary.png")
    parts = [_image(folder / "summary.png"), _HOW_TO_READ]
    for n, lr in _compared(results):
        picture = folder / f"mismatches-n{n}-lr{lr:g}.png"
        save_mismatches(results, n, lr, picture)
        parts += [f"<h2>Mismatches, N = {n}, learning rate {lr:g}</h2>", _image(picture)]
    for mismatch, lr in results.settings:
        picture = folder / f"curves-{mismatch}-lr{lr:g}.png"
        save_curves(results, mismatch, lr, picture)
        ns = results.ns(mismatch, lr)
        parts += [
            f"<h2>{html.escape(setting_name(mismatch, lr))}</h2>",
            "<p>Accuracy at the end, mean over seeds [lowest..highest]:</p>",
            _table(["method", *(f"N = {n}" for n in ns)], accuracies(results, mismatch, lr)),
            _image(picture),
        ]
    heading = ["method", "N", "mismatch", "lr", "seeds", *(title for title, _ in FIGURES.values()), "marks"]
    parts += ["<h2>All figures</h2><p>Means over all updates of a run, where nothing else is said.</p>"]
    parts += [f'<div class="wide">{_table(heading, [details(row) for row in results.rows()])}</div>']
    parts += ["<h2>What was run</h2>", f"<pre>{html.escape(grid.model_dump_json(indent=1, exclude_unset=True))}</pre>"]
    title = html.escape(grid.title)
    (folder / "index.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_CSS}</style>'
        f"<h1>{title}</h1>{''.join(parts)}</html>",
        encoding="utf-8",
    )


def _compared(results: Results) -> list[tuple[int, float]]:
    """N and learning rate under which there is more than one mismatch."""
    found: dict[tuple[int, float], set[str]] = {}
    for cell, _ in results.outcomes:
        found.setdefault((cell.n, cell.lr), set()).add(cell.mismatch)
    return sorted(key for key, mismatches in found.items() if len(mismatches) > 1)


def _image(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}"></p>'


def _table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in heading)}</tr>{rows}</table>"
