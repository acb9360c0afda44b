"""docs/tutorial.md runs as it is written: its ```bash blocks, in their order, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vespo.metrics.records import read_metrics

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
# What the page takes from the root of the repository, where it says to start.
NEEDED = {".venv": Path(sys.prefix), "tools": ROOT / "tools"}


def blocks() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page was followed."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name, target in NEEDED.items():
        (folder / name).symlink_to(target)
    script = "set -euo pipefail\n" + "\n".join(blocks())
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    (folder / "printed").write_text(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_policy_gets_better_at_questions_it_has_not_seen(folder: Path) -> None:
    records = read_metrics(folder / "runs" / "my-run" / "metrics.jsonl")
    steps, accuracy = records.series("eval/heldout/accuracy")
    assert steps == [0, 6, 12]
    assert accuracy[-1] > max(0.85, accuracy[0] + 0.15)
    # Both parts of the reward are learned: the right digit, and no word beside it.
    _, lengths = records.series("eval/heldout/response_length_mean")
    assert lengths[-1] < lengths[0] - 0.5
    asked = {
        name: {json.loads(line)["prompt"] for line in (folder / "my_task" / f"{name}.jsonl").open()}
        for name in ("sft", "train", "heldout")
    }
    assert not asked["heldout"] & (asked["sft"] | asked["train"]) and not asked["sft"] & asked["train"]


def test_what_the_page_points_at_is_there(folder: Path) -> None:
    run = folder / "runs" / "my-run"
    for name in ("summary.md", "report.html", "evaluation/results.md", "hf/latest/config.json", "config.yaml"):
        assert (run / name).stat().st_size > 0, name
    assert json.loads((folder / "my_task/exported/config.json").read_text())["num_experts"] == 4
    assert list((folder / "my_task" / "exported").glob("*.safetensors"))
    printed = (folder / "printed").read_text()
    assert "9 <eos> 1.0\nthe largest is 9 <eos> 0.7\n4 <eos> 0.0\n" in printed
    assert "written and verified" in printed
    assert "held-out accuracy of heldout:" in printed
