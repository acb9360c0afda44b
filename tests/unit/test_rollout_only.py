import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_rollouts_alone_load_nothing_of_megatron() -> None:
    code = (
        "import sys, megatron_vespo.train, megatron_vespo.rollout_only\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('megatron', 'sglang')]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
