"""What a rank imports."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import megatron_vespo.training
heavy = {"wandb", "tensorboard", "matplotlib", "datasets", "transformers", "sglang"} & set(sys.modules)
import wandb  # by whoever asks for it
from torch.utils.tensorboard import SummaryWriter
from megatron.core import timers
print(sorted(heavy), timers.wandb, wandb.__name__, SummaryWriter.__name__)
"""


def test_a_rank_imports_nothing_that_only_one_needs() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout == "[] None wandb SummaryWriter\n", done.stdout + done.stderr
