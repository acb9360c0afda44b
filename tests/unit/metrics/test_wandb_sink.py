"""With the real package, offline; what it writes is its own format, in which names and texts stand as they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vespo.errors import UserError
from megatron_vespo.metrics.sinks import TensorBoardSink

ROOT = Path(__file__).parents[3]
VALUES = {"train/loss": 0.53125, "vespo/phi_mean_neg": None, "eval/aime/pass_at_4": 0.25, "perf/step_time": 2.5}


def test_names_are_those_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from megatron_vespo.metrics.wandb_sink import WandbSink

    config = {"algorithm": {"kernel": "vespo-of-this-test"}}
    first = WandbSink(tmp_path, "offline", "project", "my-run", config, tags=["tag-of-this-test"])
    first.write(1, VALUES)
    first.close()
    again = WandbSink(tmp_path, "offline", "project", "my-run", config)  # resumed: a step is written again
    again.write(1, {"train/loss": 0.78125})
    again.close()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in files}) == 1, "both have the same W&B id"
    data = b"".join(path.read_bytes() for path in files)
    names = {name.decode() for name in re.findall(rb"(?:train|vespo|eval|perf)/\w+(?:/\w+)?", data)}
    board = TensorBoardSink(tmp_path / "tensorboard")
    board.write(1, VALUES)
    board.close()
    assert names == set(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"])
    for text in (b"0.53125", b"0.78125", b"vespo-of-this-test", b"tag-of-this-test", b"my-run"):
        assert text in data


def test_it_is_imported_only_where_it_is_wanted() -> None:
    code = "import sys, megatron_vespo.recorders, megatron_vespo.metrics.wandb_sink\nassert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vespo.metrics.wandb_sink import WandbSink

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        WandbSink(tmp_path, "offline", "p", "n", {})
