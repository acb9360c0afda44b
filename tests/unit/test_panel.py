"""The health panel's warnings, files and end of a run, fed with batches made up here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vespo import panel as panel_module
from megatron_vespo.config import HealthSection
from megatron_vespo.errors import UserError
from megatron_vespo.metrics.registry import StepMetrics
from megatron_vespo.metrics.report import write_report
from megatron_vespo.metrics.rollback import roll_back
from megatron_vespo.panel import HealthPanel
from megatron_vespo.policy.figures import Measured, TokenScores
from megatron_vespo.types import Prompt, Sample


class Run:
    """A panel and what it says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, main: bool = True, **settings: Any) -> None:
        monkeypatch.setattr(panel_module.parallel, "is_main", lambda: main)
        monkeypatch.setattr(panel_module.parallel, "broadcast_bytes", lambda payload: payload)
        self.said: list[str] = []
        self.folder = folder
        self.panel = HealthPanel(HealthSection(**settings), folder, str, self.said.append, 80.0)
        self.steps = 0

    def step(self, noise: float = 0.0, phi: float = 1.0, spoilt: bool = False) -> dict[str, float | None]:
        """A step of two minibatches of four responses of 100 tokens, trainer and sampler ``noise`` apart."""
        rng = np.random.default_rng(self.steps)
        self.steps += 1
        metrics = StepMetrics()
        samples = [make_sample(i, rng) for i in range(8)]
        self.panel.begin(samples)
        for part in (samples[:4], samples[4:]):
            log_pi = [(s.log_mu + rng.normal(0, noise, 100)).astype(np.float32) for s in part]
            if spoilt:
                log_pi[0][7] -= 5
            for sample in part:  # as with behavior_logprobs: recompute, which is no business of the panel
                sample.log_mu = np.zeros(100, np.float32)
            table = {"log_w": np.zeros(4), "phi": np.full(4, phi)}
            entropy = [np.full(100, 1.5, np.float32)] * 4
            self.panel.observe(part, Measured(table, TokenScores(log_pi, entropy)), 8)
        metrics.add("vespo/phi_mean", phi)
        return self.panel.conclude(self.steps, metrics)


def make_sample(index: int, rng: np.random.Generator) -> Sample:
    ids = rng.integers(0, 50, 100).astype(np.int32)
    log_mu = -rng.exponential(1.6, 100).astype(np.float32)
    versions = np.full(100, 8, np.int32)
    return Sample(Prompt(index, ids[:2]), 0, ids, log_mu, versions, "length", advantage=1.0 - 2 * (index % 2))


def test_a_sound_run_is_left_in_peace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    for _ in range(3):
        values = run.step(noise=1e-6)
    assert values["health/kl_fresh"] == pytest.approx(0, abs=1e-9)
    assert not run.said and not list(tmp_path.iterdir())
    assert not run.panel.hopeless()
    run.panel.raise_if_hopeless()


def test_a_fault_is_told_of_once_with_cause_and_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    for _ in range(4):
        run.step(noise=0.1)
    (text,) = run.said
    assert text.startswith("warning: step 1: health/kl_fresh is 0.00") and "above 0.002" in text
    assert "likely cause: the sampler computes with rounded weights" in text and "trainer's precision" in text
    (line,) = (tmp_path / "health" / "warnings.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1


def test_a_fault_without_a_condition_is_told_of_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, warn={"mismatch": 1.0})
    run.step(noise=0.1)
    run.step(noise=0.1)
    assert len(run.said) == 1 and "step 1: the sampler computes with rounded weights" in run.said[0]


def test_what_comes_back_after_long_is_told_of_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    for noise in (0.1, 0, 0.1, *[0] * 21, 0.1):
        run.step(noise=noise)
    assert [text.split(":")[1] for text in run.said] == [" step 1", " step 25"]


def test_outliers_are_written_with_their_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, tokens_written=1)
    values = run.step(spoilt=True)
    assert values["health/outlier_tokens"] == 2
    record = json.loads((tmp_path / "health" / "step_000001.json").read_text())
    (token,) = record["tokens"]
    assert record["tokens_beyond"] == 2 and token["sample"] in ("0/0", "4/0") and token["position"] == 7
    assert token["log_mu"] - token["log_pi"] == pytest.approx(5, abs=1e-5)
    assert token["text"] == f"[{token['id']}]"
    assert run.step()["health/outlier_tokens"] == 0
    assert not (tmp_path / "health" / "step_000002.json").exists()


def test_a_silent_run_is_ended_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch, stop_when={"silent": 2})
    run.step(noise=0.2, phi=0.01)
    assert not run.panel.hopeless()
    run.step(noise=0.2, phi=0.015)
    assert run.panel.hopeless()
    with pytest.raises(UserError) as caught:
        run.panel.raise_if_hopeless()
    text = str(caught.value)
    assert "health.stop_when: vespo/phi_mean is 0.015, below 0.02: nothing can be learned, for 2 steps in a row" in text
    assert "likely cause: the sampler computes with rounded" in text


def test_by_default_only_what_is_hopeless_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, monkeypatch)
    ends = []
    for phi in (0.01, 0.01, 0.01, 0.01, 0.03, 0.01, 0.01, 0.01, 0.01, 0.01):
        run.step(phi=phi)
        ends.append(run.panel.hopeless())
    assert ends == [False] * 9 + [True]


def test_other_ranks_and_panels_switched_off_look_at_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({"main": False}, {"enabled": False}):
        run = Run(tmp_path, monkeypatch, **settings)
        assert run.step(noise=1.0) == {} and not run.said


def test_the_summary_repeats_the_warnings_and_a_resumed_run_takes_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, monkeypatch)
    run.step()
    run.step(noise=0.1, spoilt=True)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    write_report(tmp_path)
    assert "- Step 2: health/kl_fresh is" in (tmp_path / "summary.md").read_text()
    roll_back(tmp_path, 1)
    assert (tmp_path / "health" / "warnings.jsonl").read_text() == ""
    assert not (tmp_path / "health" / "step_000002.json").exists()
    write_report(tmp_path)
    assert "Step 2" not in (tmp_path / "summary.md").read_text()
