"""Sweeps: what a grid says, what a run leaves, and that a bad cell or a stopped sweep loses nothing."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.staleness_lab import workers
from examples.staleness_lab.cell import make_config
from examples.staleness_lab.outcome import Outcome, is_finished, outcome_path, read_outcome
from examples.staleness_lab.page import write_up
from examples.staleness_lab.settings import Cell, Grid, Task, read_grid
from examples.staleness_lab.sweep import run
from megatron_vespo.assemble import make_algorithm
from megatron_vespo.errors import UserError

ROOT = Path(__file__).parents[3]
TASK = {"updates": 4, "prompts_per_minibatch": 2, "samples_per_prompt": 4, "sft_steps": 21, "evaluate_every": 2}
GRID: dict[str, Any] = {
    "title": "A small sweep",
    "task": TASK,
    "methods": {"vespo": {"kernel": "vespo"}, "soft": {"kernel": "vespo", "kernel_params": {"c2_pos": 2.0}}},
    "mismatches": {
        "bf16": {"sampler_dtype": "bfloat16"},
        "fp8-trainer": {"trainer_fp8": {"linears": "all"}},
        "held-back": {"hold_back": 1},
    },
    "blocks": [{"n": [2, 4], "seeds": [1]}, {"methods": ["vespo"], "n": [2], "mismatch": ["held-back"], "seeds": [1]}],
}


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/staleness_lab/*.yaml")), ids=lambda path: path.name)
def test_every_cell_of_the_shipped_sweeps_is_a_valid_run(path: Path) -> None:
    cells = read_grid(path).cells()
    assert len({cell.name for cell in cells}) == len(cells) > 0
    for cell in cells:
        config = make_config(cell, Path("start"))
        make_algorithm(config)
        assert config.training.steps * config.training.minibatches_per_step == cell.task.updates


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blocks": [{"n": [3]}]}, "n=3 does not divide task.updates=4"),
        ({"blocks": [{"n": [2], "methods": ["vepso"]}]}, "no method 'vepso'; there are vespo, soft"),
        ({"blocks": [{"n": [2], "mismatch": ["fp4"]}]}, "no mismatch 'fp4'"),
        ({"blokcs": []}, "blokcs"),
    ],
)
def test_what_is_wrong_in_a_grid_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(json.dumps(GRID | change))
    with pytest.raises(UserError, match=message):
        read_grid(path)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Grid, Path]]:
    folder = tmp_path_factory.mktemp("sweep")
    grid = Grid.model_validate(GRID)
    assert run(grid, folder, workers=2) == []
    yield grid, folder


def test_a_run_is_recorded_update_by_update(swept: tuple[Grid, Path]) -> None:
    grid, folder = swept
    for cell in grid.cells():
        outcome = read_outcome(outcome_path(folder, cell))
        assert all(len(values) == 4 for values in outcome.history.values())
        assert [update for update, _ in outcome.accuracy] == [0, 2, 4]
        # The first minibatch after a push is on-policy, without mismatch and at staleness 0.
        held_back = cell.mismatch == "held-back"
        assert outcome.history["staleness"] == ([0, 1, 2, 3] if held_back or cell.n == 4 else [0, 1, 0, 1])
        fresh = [
            value
            for value, age in zip(outcome.history["log_w_abs"], outcome.history["staleness"], strict=True)
            if age == 0
        ]
        assert max(fresh) < 1e-4
        flips = outcome.history["router_flip_rate"]
        assert all(rate is not None and rate < 0.5 for rate in flips) and flips[0] == 0
        assert min(outcome.history["grad_norm"]) >= 0 and outcome.history["entropy"][0] > 0.1


def test_the_write_up_holds_every_cell(swept: tuple[Grid, Path]) -> None:
    grid, folder = swept
    write_up(grid, folder)
    rows = json.loads((folder / "table.json").read_text())
    assert len(rows) == 5 and {row["method"] for row in rows} == {"vespo", "soft"}
    assert all(row["figures"]["final"]["min"] <= row["figures"]["final"]["mean"] for row in rows)
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # summary, one comparison of mismatches, two settings
    assert "src=" in page and "http" not in page  # it needs nothing else
    assert "| soft | 4 | none | 0.001 | 1 |" in (folder / "table.md").read_text()


def test_what_was_run_is_not_run_again(swept: tuple[Grid, Path], capsys: pytest.CaptureFixture[str]) -> None:
    grid, folder = swept
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    assert run(grid, folder, workers=2) == []
    assert "5 cells, 5 of them done before" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in times}
    changed = Grid.model_validate(GRID | {"methods": {**GRID["methods"], "soft": {"kernel": "reinforce"}}})
    assert [is_finished(folder, cell) for cell in changed.cells()].count(False) == 2  # another soft


def test_a_bad_cell_costs_itself_alone(
    swept: tuple[Grid, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid, folder = swept
    template = read_outcome(next((folder / "cells").iterdir()))

    def fake(cell: Cell, start: Path) -> Outcome:
        if cell.method == "soft" and cell.n == 2:
            raise ValueError("no good")
        if cell.method == "soft":
            os._exit(7)
        return replace(template, cell=cell.definition)

    monkeypatch.setattr(workers, "run_cell", fake)
    (start,) = folder.glob("start-*")
    (tmp_path / start.name).symlink_to(start)
    failed = run(grid, tmp_path, workers=1)
    assert {(cell.method, cell.n) for cell in failed} == {("soft", 2), ("soft", 4)}
    assert len(list((tmp_path / "cells").iterdir())) == 3
    told = capsys.readouterr().out
    assert "ValueError: no good" in told and "died with exit code 7" in told


def make_outcome(accuracy: list[float], phi_small: float = 0.0, diverged: str = "") -> Outcome:
    history = {"phi_small_share": [0.0] * 20 + [phi_small] * 16}
    return Outcome({}, history, list(enumerate(accuracy)), 1.0, diverged)


def test_words_for_how_a_run_ended() -> None:
    fine = make_outcome([0.5, 0.9, 0.8])
    assert (fine.final, fine.best, fine.collapsed, fine.frozen) == (0.8, 0.9, False, False)
    assert make_outcome([0.5, *[0.9] * 5, 0.7, 0.8]).final == pytest.approx(0.75)  # the last quarter
    assert (fine.updates_to_good, make_outcome([0.5, 0.89]).updates_to_good) == (1.0, None)
    assert make_outcome([0.5, 0.98, 0.48]).collapsed  # less than half of the best
    assert make_outcome([0.5, 0.6, 0.44]).collapsed  # below the start
    assert not make_outcome([0.5, 0.5, 0.49]).collapsed
    assert make_outcome([0.5, 0.7], phi_small=0.95).frozen and not make_outcome([0.5, 0.7], phi_small=0.85).frozen
    ended = make_outcome([0.5, 0.9], diverged="NaN")
    assert ended.final == 0 and ended.collapsed


def test_the_start_depends_on_the_task_alone() -> None:
    from examples.staleness_lab.sweep import _fingerprint

    assert _fingerprint(Task(updates=64)) == _fingerprint(Task(updates=128))
    assert _fingerprint(Task(sft_steps=10)) != _fingerprint(Task(sft_steps=11))
