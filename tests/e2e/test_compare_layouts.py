"""The layouts agree, the tool says so, and it finds a reduction that is left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.launch import RankFailure
from megatron_vespo.layouts import worker
from megatron_vespo.layouts.layout import Layout
from megatron_vespo.layouts.report import as_text
from megatron_vespo.layouts.run import Comparison, compare_layouts
from megatron_vespo.rollout.batches import save_batch
from megatron_vespo.types import Sample, SampleGroup
from tests.e2e.broken_ranks import keep_norm_gradients_apart, keep_replicas_out_of_the_loss, keep_samples_apart
from tests.policies import off_policy_samples
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

ROOT = Path(__file__).parents[2]
VOCABULARY = 50  # no multiple of 16, to which it is padded


@dataclass(frozen=True)
class Case:
    """A configuration and a saved batch."""

    config: Path
    batch: Path


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


# The second of a name is the first again, microbatches of 30 tokens being what the configuration says.
SOUND = ("1", "dp2", "tp2")
BROKEN = {"dp2-mb30": keep_replicas_out_of_the_loss, "tp2-mb30": keep_norm_gradients_apart, "ep2": keep_samples_apart}


def work(name: str, arguments: Sequence[str], logs: Path) -> int:
    """One rank of a layout, with its log where torchrun's engine has it; its exit status."""
    folder = logs / "run" / "attempt_0" / os.environ["RANK"]
    folder.mkdir(parents=True)
    with (folder / "stderr.log").open("w") as log, redirect_stderr(log):
        try:
            BROKEN.get(name, lambda: None)()
            return worker.main(arguments)
        except Exception:  # noqa: BLE001 - as at the end of a process
            traceback.print_exc()
            return 1


def fork(layout: Layout, arguments: Sequence[str], logs: Path) -> RankFailure | None:
    """Ranks that need not import Megatron; the tests of the command line have them launched."""
    statuses = run_ranks(layout.ranks, work, layout.name, arguments, logs, initialize=False)
    return next((RankFailure(rank, status) for rank, status in enumerate(statuses) if status), None)


@dataclass(frozen=True)
class Compared:
    """Layouts, some of them broken, and what was said meanwhile."""

    comparison: Comparison
    said: list[str]


@pytest.fixture(scope="module")
def compared(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    said: list[str] = []
    layouts = [Layout.parse(name) for name in (*SOUND, *BROKEN)]
    folder = tmp_path_factory.mktemp("work")
    return Compared(compare_layouts(case.config, case.batch, layouts, [], folder, launch=fork, say=said.append), said)


def test_layouts_agree(compared: Compared) -> None:
    comparison = compared.comparison
    rows = comparison.rows[: len(SOUND)]
    assert all(row.agrees for row in rows), as_text(comparison)
    assert "dp2: ok" in " ".join(compared.said)
    reference = comparison.reference
    # What was compared is not trivial: off-policy, clipped, several microbatches, samples that do not divide evenly.
    assert np.abs(reference.column("log_w")).max() > 0.1 and reference.column("phi").min() < 0.95
    assert reference.grad_norm > 0.2 and reference.facts["largest_change"] > 5e-4
    assert 0 in reference.table["tokens"] and len(comparison.samples) % 2 == 1
    assert rows[0].facts["microbatches"] > rows[1].facts["microbatches"] > 1
    assert all(row.differences["step"].value > 0 for row in rows)


def test_a_reduction_that_is_left_out_is_found(compared: Compared) -> None:
    comparison, text = compared.comparison, as_text(compared.comparison)
    replicas, norms, table = rows = comparison.rows[len(SOUND) :]
    assert not any(row.agrees for row in rows) and not comparison.agrees, text
    assert "dp2-mb30: grad norm is off by 0.5 " in text
    assert replicas.off == ["grad_norm"], "clipping hides it from the weights"
    assert "tp2-mb30: weights is off by" in text and "norm.weight" in norms.differences["weights"].where
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
    files = {name: tmp_path / f"table.{name}" for name in ("json", "markdown")}
    outputs = [argument for name, path in files.items() for argument in (f"--{name}", str(path))]
    run("tools/compare_layouts.py", "--config", config, "--batch", str(batch), "--layouts", "dp2", *outputs, latest)
    tree = json.loads(files["json"].read_text())
    (row,) = tree["layouts"]
    assert tree["agrees"] and row["layout"] == "dp2" and row["off"] == [] and not row["error"]
    assert "| dp2 | 2 | " in files["markdown"].read_text()
    assert tree["reference"]["metrics"]["vespo/log_w_abs_mean"] > 0.1, "off-policy, or phi would not be compared"
    assert tree["reference"]["metrics"]["train/samples"] == 35
