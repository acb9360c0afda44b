"""The layouts agree, the tool says so, and it finds a reduction that is left out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vespo.layouts.layout import Layout
from megatron_vespo.layouts.report import as_text
from megatron_vespo.layouts.run import Comparison, compare_layouts
from megatron_vespo.rollout.batches import save_batch
from megatron_vespo.types import Sample, SampleGroup
from tests.policies import off_policy_samples
from tests.tiny_models import make_tiny_qwen3_moe

ROOT = Path(__file__).parents[2]
VOCABULARY = 50  # no multiple of 16, to which it is padded


@dataclass(frozen=True)
class Case:
    """A configuration and a saved batch."""

    config: Path
    batch: Path

    def compare(self, folder: Path, *names: str, **options: Any) -> Comparison:
        folder.mkdir()
        return compare_layouts(self.config, self.batch, [Layout.parse(name) for name in names], [], folder, **options)


def make_groups(samples: Sequence[Sample]) -> list[SampleGroup]:
    """Groups of three and the rest, with varied rewards."""
    rng = np.random.default_rng(2)
    groups = []
    for start in range(0, len(samples), 3):
        prompt = samples[start].prompt
        members = [
            replace(sample, prompt=prompt, index=index, reward=float(rng.normal()))
            for index, sample in enumerate(samples[start : start + 3])
        ]
        groups.append(SampleGroup(prompt, members))
    return groups


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("layouts")
    model = make_tiny_qwen3_moe(folder / "model", vocab_size=VOCABULARY)
    groups = make_groups(off_policy_samples(model, 11))
    save_batch(folder / "batch.msgpack", groups, step=1, policy_version=1, temperature=1.0, vocab_size=VOCABULARY)
    tree = {
        "run": {"name": "x"},
        "model": {"hf_path": str(model), "make_vocab_size_divisible_by": 16},
        "megatron": {"lr": 1e-6, "weight_decay": 0.1, "clip_grad": 0.2},
        "data": {"train": "not read"},
        "training": {"steps": 1, "max_tokens_per_microbatch": 30},
    }
    (folder / "config.yaml").write_text(json.dumps(tree))
    return Case(folder / "config.yaml", folder / "batch.msgpack")


def test_layouts_agree(case: Case, tmp_path: Path) -> None:
    said: list[str] = []
    comparison = case.compare(tmp_path / "work", "1", "dp2", "tp2", say=said.append)
    text = as_text(comparison)
    assert comparison.agrees, text
    assert "dp2: ok" in " ".join(said)
    reference = comparison.reference
    # What was compared is not trivial: off-policy, clipped, several microbatches, samples that do not divide evenly.
    assert np.abs(reference.column("log_w")).max() > 0.1 and reference.column("phi").min() < 0.95
    assert reference.grad_norm > 0.2 and reference.facts["largest_change"] > 5e-4
    assert 0 in reference.table["tokens"] and len(comparison.samples) % 2 == 1
    assert comparison.rows[0].facts["microbatches"] > comparison.rows[1].facts["microbatches"] > 1
    assert all(row.differences["step"].value > 0 for row in comparison.rows)


def test_a_reduction_that_is_left_out_is_found(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    comparison = case.compare(tmp_path / "work", "dp2", "tp2", "ep2", worker="tests.e2e.broken_worker")
    text = as_text(comparison)
    replicas, norms, table = comparison.rows
    assert not any(row.agrees for row in comparison.rows), text
    assert "dp2: grad norm is off by 0.5 " in text
    assert replicas.off == ["grad_norm"], "clipping hides it from the weights"
    assert "tp2: weights is off by" in text and "norm.weight" in norms.differences["weights"].where
    assert {"weights", "step"} <= set(norms.off) <= {"grad_norm", "weights", "step", "ranks"}, "log W is right"
    assert "samples reported by other than one rank" in table.error and f"ep2: {table.error}" in text


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/compare_layouts.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_the_command_line(case: Case, tmp_path: Path) -> None:
    """A layout that agrees and one that cannot run: a table, files, and a status that says so."""
    files = {name: tmp_path / f"table.{name}" for name in ("json", "markdown")}
    outputs = [argument for name, path in files.items() for argument in (f"--{name}", str(path))]
    inputs = ["--batch", str(case.batch), "--config", str(case.config)]
    result = tool(*inputs, *outputs, "--layouts", "1", "TP3", "training.max_tokens_per_microbatch=40")
    assert result.returncode == 1, result.stderr
    tree = json.loads(files["json"].read_text())
    assert [row["layout"] for row in tree["layouts"]] == ["1", "tp3"]
    good, bad = tree["layouts"]
    assert good["off"] == [] and not good["error"] and not tree["agrees"]
    assert "error: " in bad["error"] or "Error" in bad["error"]
    assert f"tp3: {bad['error']}" in result.stdout
    assert "| 1 | 1 | " in files["markdown"].read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--layouts", "tp2", "cp2"], "'cp2' is not a size"),
        (["megatron.bf16=true"], "megatron.bf16=True"),
        (["rollout.temperature=0.5"], "was sampled at 1.0"),
        (["--batch", "/no/such/file"], "/no/such/file"),
        (["megatron.tensor_model_paralel_size=2"], "did you mean"),
        (["--logs", "tools"], "tools is not empty"),
    ],
)
def test_bad_input_is_one_clear_error(case: Case, arguments: list[str], message: str) -> None:
    result = tool("--batch", str(case.batch), "--config", str(case.config), *arguments)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_example(tmp_path: Path) -> None:
    """What ``make layouts`` does, with one layout: a run with SGLang saves its batches, one is compared on."""

    def run(*command: str) -> None:
        result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert result.returncode == 0, result.stdout + result.stderr

    example = ROOT / "examples" / "layouts_cpu"
    config = str(example / "config.yaml")
    run(str(example / "task.py"), str(tmp_path / "data"))
    inputs = [f"model.hf_path={tmp_path}/data/model", f"data.train={tmp_path}/data/prompts.jsonl"]
    run("-m", "megatron_vespo.launch", config, *inputs, f"run.folder={tmp_path}")
    latest = f"model.hf_path={tmp_path}/layouts/hf/latest"
    batch = tmp_path / "layouts" / "rollouts" / "batch_000002.msgpack"
    table = tmp_path / "table.json"
    arguments = ["--config", config, "--batch", str(batch), "--layouts", "dp2", "--json", str(table), latest]
    run("tools/compare_layouts.py", *arguments)
    tree = json.loads(table.read_text())
    assert tree["agrees"] and tree["layouts"][0]["layout"] == "dp2"
    assert tree["reference"]["metrics"]["vespo/log_w_abs_mean"] > 0.1, "off-policy, or phi would not be compared"
    assert tree["reference"]["metrics"]["train/samples"] == 35
