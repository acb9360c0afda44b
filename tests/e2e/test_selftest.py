"""The self-test that ends the image's build, in this environment."""

import subprocess
import sys
from pathlib import Path

from megatron_vespo.environment.checks import MEGATRON, SGLANG

ROOT = Path(__file__).parents[2]


def test_the_self_test_passes_here() -> None:
    result = subprocess.run([sys.executable, ROOT / "tools" / "selftest.py"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["Megatron-Core"] == MEGATRON and lines["SGLang"].startswith(f"{SGLANG} with torch ")
    assert lines["trainer"] == "imports" and lines["configuration"] == "rl.yaml is read"
