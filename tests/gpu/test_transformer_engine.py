"""Transformer Engine layers compute what the torch-native ones do. Needs a GPU with Transformer Engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_models import make_tiny_qwen3_moe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# A process of its own: CUDA does not survive the fork that other tests use.
SCRIPT = """
import os, sys
from pathlib import Path
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
from megatron_vespo import parallel
from tests.policies import make_policy, random_samples
section = {"bf16": True, "lr": 1e-3, "use_distributed_optimizer": True}
parallel.initialize(section, seed=1)
samples = random_samples(8, 64)
results = []
for layer_spec in ("local", "transformer_engine"):
    policy = make_policy(Path(sys.argv[1]), section, layer_spec=layer_spec)
    results.append(policy.log_probs(samples, [list(range(8))]))
worst = max(abs(a - b).max() for a, b in zip(*results) if len(a))
assert worst < 0.1, worst
"""


def test_log_probs_agree_with_the_local_spec_in_bf16(tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine.pytorch")
    # cuDNN's fused attention wants a head dimension of 64 or more; FP8-ready linears multiples of 16.
    folder = make_tiny_qwen3_moe(tmp_path / "model", hidden_size=128, head_dim=64, moe_intermediate_size=64)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=300, cwd=Path.cwd()
    )
    assert result.returncode == 0, result.stderr
