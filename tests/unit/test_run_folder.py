"""What stays of an earlier attempt, and who may write into a run folder."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.config import Config
from megatron_vespo.config_file import dump_config, load_config, parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.run_folder import (
    check_run_folder,
    locked,
    prepare_run_folder,
    refuse_if_locked,
    resume_step,
)

ROOT = Path(__file__).parents[2]


def configure(folder: Path, **run: Any) -> Config:
    training = {"steps": run.pop("steps", 10)}
    return parse_config(
        {
            "run": {"name": "r", "folder": str(folder), **run},
            "model": {"hf_path": "model"},
            "data": {"train": "train.jsonl"},
            "training": training,
        }
    )


def prepare(config: Config) -> None:
    prepare_run_folder(config, dump_config(config))


def leave_run(folder: Path, *steps: int) -> Path:
    """What a run leaves that saved checkpoints of these steps and then died."""
    prepare(configure(folder))
    run = folder / "r"
    (run / "metrics.jsonl").write_text("{}")
    (run / "logs" / "error.txt").write_text("rank 1: no")
    (run / "rollouts").mkdir()
    for step in steps:
        checkpoint = run / "checkpoints" / f"iter_{step:07d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    return run


def refusal(config: Config) -> str:
    with pytest.raises(UserError) as caught:
        prepare(config)
    return str(caught.value)


def test_an_existing_run_is_kept_unless_told(tmp_path: Path) -> None:
    run = leave_run(tmp_path)
    assert load_config(run / "config.yaml") == configure(tmp_path)
    message = refusal(configure(tmp_path))
    assert "--resume auto" in message and "run.overwrite=true" in message
    assert (run / "metrics.jsonl").exists()
    prepare(configure(tmp_path, overwrite=True))
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "logs"]


def test_an_empty_or_merely_locked_run_folder_is_no_earlier_run(tmp_path: Path) -> None:
    config = configure(tmp_path)
    config.run_folder.mkdir(parents=True)
    (config.run_folder / ".lock").touch()
    prepare(config)
    assert (config.run_folder / ".lock").exists()


def test_only_complete_checkpoints_count(tmp_path: Path) -> None:
    run = leave_run(tmp_path, 5, 10)
    (run / "checkpoints" / ".iter_0000015.tmp-x").mkdir()
    (run / "checkpoints" / "iter_0000020.partial").mkdir()
    assert resume_step(configure(tmp_path, resume="auto")) == 10


def test_a_run_that_went_back_goes_on_from_there(tmp_path: Path) -> None:
    run = leave_run(tmp_path, 5, 10)
    (run / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("5")
    assert resume_step(configure(tmp_path, resume="auto")) == 5


def test_auto_goes_on_from_the_newest_and_keeps_everything(tmp_path: Path) -> None:
    run = leave_run(tmp_path, 5, 10)
    config = configure(tmp_path, resume="auto", overwrite=True)
    assert resume_step(config) == 10
    prepare(config)
    assert (run / "metrics.jsonl").exists() and (run / "checkpoints" / "iter_0000005").exists()
    assert not (run / "logs" / "error.txt").exists()  # else the new attempt would keep silent about its own error


def test_an_earlier_configuration_is_kept_where_it_differs(tmp_path: Path) -> None:
    run = leave_run(tmp_path, 5)
    first = (run / "config.yaml").read_text()
    prepare(configure(tmp_path, resume="auto"))
    assert not list(run.glob("config.until*"))
    for steps in (20, 30):  # the second attempt from step 5 must not replace the configuration that led there
        prepare(configure(tmp_path, resume="auto", steps=steps))
        assert load_config(run / "config.yaml").training.steps == steps
        assert [path.name for path in run.glob("config.until*")] == ["config.until_step_000005.yaml"]
        kept = load_config(run / "config.until_step_000005.yaml")
        assert kept.training.steps == 10 and kept.model == load_config_text(first, tmp_path).model


def load_config_text(text: str, folder: Path) -> Config:
    (folder / "text.yaml").write_text(text)
    return load_config(folder / "text.yaml")


def test_auto_replaces_what_died_before_its_first_checkpoint(tmp_path: Path) -> None:
    run = leave_run(tmp_path)
    (run / "hf").mkdir()
    prepare(configure(tmp_path, resume="auto"))
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "logs"]


def test_auto_deletes_neither_a_strangers_folder_nor_saved_models(tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "thesis.tex").touch()
    assert "it is not a run's folder" in refusal(configure(tmp_path, resume="auto"))
    (run / "thesis.tex").unlink()
    leave_run(tmp_path)
    (run / "hf" / "latest").mkdir(parents=True)
    assert "saved models in hf/" in refusal(configure(tmp_path, resume="auto"))
    assert (run / "hf" / "latest").exists()
    prepare(configure(tmp_path, resume="auto", overwrite=True))
    assert not (run / "hf").exists()


def test_a_step_must_have_its_checkpoint(tmp_path: Path) -> None:
    assert "there is no checkpoint to go on from" in refusal(configure(tmp_path, resume=7))
    leave_run(tmp_path, 5, 10)
    assert refusal(configure(tmp_path, resume=7)).endswith("there is no checkpoint 7; there are 5, 10")
    assert resume_step(configure(tmp_path, resume=5)) == 5
    prepare(configure(tmp_path, resume=5))


HOLD = """
import os, sys, time
from pathlib import Path
from megatron_vespo.run_folder import locked
with locked(Path(sys.argv[1])):
    child = os.fork()  # neither a fork nor a program that is executed may keep the lock when the holder is killed
    if child == 0:
        print(os.getpid(), flush=True)  # it has closed its copy by now
        time.sleep(60)
        os._exit(0)
    import subprocess
    sleeper = subprocess.Popen(["sleep", "60"])
    print(sleeper.pid, flush=True)
    time.sleep(60)
"""


def test_a_locked_folder_names_its_holder_and_is_free_when_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT) as holder:
        assert holder.stdout is not None
        children = [int(holder.stdout.readline()) for _ in range(2)]
        try:
            for attempt in (lambda: refuse_if_locked(tmp_path), lambda: locked(tmp_path).__enter__()):
                with pytest.raises(UserError, match=rf"host .+, process {holder.pid}\)"):
                    attempt()
        finally:
            holder.kill()
            holder.wait()
        with locked(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()
        for pid in children:
            os.kill(pid, 9)


def test_a_lock_is_left_with_its_body(tmp_path: Path) -> None:
    refuse_if_locked(tmp_path)
    assert not (tmp_path / ".lock").exists()
    with locked(tmp_path), pytest.raises(UserError, match="in use"):
        refuse_if_locked(tmp_path)
    refuse_if_locked(tmp_path)
    check_run_folder(configure(tmp_path.parent, name=tmp_path.name))
