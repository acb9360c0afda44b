"""Checkpoints that are damaged, incomplete, of another model or mean harm are refused; nothing in them runs."""

import argparse
import io
import json
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vespo.checkpoint_folder import file_record
from megatron_vespo.models.convert import torch_dist_to_hf
from megatron_vespo.models.describe import describe
from tests.checkpoints import load, save_three
from tests.distributed.test_checkpoint_tools import alone
from tests.policies import random_samples
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

VOCABULARY = 50
DISTRIBUTED = {"use_distributed_optimizer": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen3_moe(tmp_path_factory.mktemp("model") / "moe", vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def saved(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_ranks(2, save_three, model, random_samples(6, VOCABULARY), folder, DISTRIBUTED)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


# --- damage ---


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {"flipped": (flip, "is damaged"), "cut": (cut, "bytes instead of"), "missing": (Path.unlink, "is missing")}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json", "run/run_state"])
def test_damage_is_refused_by_name(model: Path, copy: Path, damage: str, name: str) -> None:
    act, text = DAMAGE[damage]
    act(copy / "iter_0000003" / name)

    def loads() -> list[tuple[str, int | None]]:
        return [load(model, copy, iteration, DISTRIBUTED)[:2] for iteration in (None, 2)]

    for (told, _), before in run_ranks(2, loads):
        assert f"iter_0000003/{name} " in told and text in told
        assert told.endswith("; go on from the one before with --resume 2")
        assert before == ("", 2)


def test_an_incomplete_checkpoint_is_refused(model: Path, copy: Path) -> None:
    (copy / "iter_0000003" / "manifest.json").unlink()
    flip(copy / "iter_0000002" / "manifest.json")
    cut(copy / "iter_0000001" / ".metadata")

    def loads() -> list[str]:
        return [load(model, copy, iteration, DISTRIBUTED)[0] for iteration in (None, 2, 1, 5)]

    for newest, flipped, first, fifth in run_ranks(2, loads):
        assert "iter_0000003 is not complete: manifest.json is missing; go on from the one before with" in newest
        assert "iter_0000002" in flipped and "--resume 1" in flipped
        assert first.endswith("; there is none before it")
        assert "there is no checkpoint 5; there are 1, 2" in fifth
    (told,) = run_ranks(1, lambda: load(model, copy / "nowhere")[0])
    assert "there is no checkpoint to go on from" in told


def test_a_checkpoint_of_another_model_is_refused(copy: Path, tmp_path: Path) -> None:
    other = make_tiny_qwen3_moe(tmp_path / "other", vocab_size=VOCABULARY, hidden_size=64)
    for told, _, _ in run_ranks(2, load, other, copy, None, DISTRIBUTED):
        assert "iter_0000003 does not fit this run" in told and "shape" in told
        assert "\n" not in told


def test_a_checkpoint_of_the_other_optimizer_is_refused(model: Path, saved: Path, tmp_path: Path) -> None:
    run_ranks(1, save_three, model, random_samples(6, VOCABULARY), tmp_path, {})
    ((told, _, _),) = run_ranks(1, load, model, tmp_path, None, DISTRIBUTED)
    ((other, _, _),) = run_ranks(1, load, model, saved, None, {})
    for message in (told, other):
        assert "iter_0000003 does not fit this run" in message and "use_distributed_optimizer" in message
        assert "--resume" not in message, "the others do not fit either"


# --- harm ---


class Harm:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def put_into_metadata(folder: Path, harm: Harm) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = harm
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def put_into_object(folder: Path, harm: Any, key: str = "common_state/shard_0_1") -> None:
    """At the end of the file, where .metadata then says that it lies."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (index,) = [index for index in metadata.storage_data if index.fqn == key]
    info = metadata.storage_data[index]
    stream = io.BytesIO()
    torch.save([harm], stream)
    path = folder / info.relative_path
    info.offset, info.length = path.stat().st_size, len(stream.getvalue())
    path.write_bytes(path.read_bytes() + stream.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def put_into_extra_state(folder: Path, harm: Harm) -> None:
    """As Transformer Engine keeps it: a pickle in a tensor of bytes."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = next(index.fqn for index in metadata.storage_data if "_extra_state" in index.fqn)
    content = torch.frombuffer(bytearray(pickle.dumps({"recipe": harm})), dtype=torch.uint8)
    put_into_object(folder, content, key)


def sign(folder: Path) -> None:
    """A manifest that fits: whoever means harm can make one."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {name: asdict(file_record(folder / name)) for name in manifest["files"]}
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "put, file",
    [(put_into_metadata, ".metadata"), (put_into_object, "_0.distcp"), (put_into_extra_state, "_0.distcp")],
)
def test_nothing_in_a_checkpoint_runs(model: Path, copy: Path, tmp_path: Path, put: Any, file: str) -> None:
    harm, folder = Harm(tmp_path / "harm"), copy / "iter_0000003"
    put(folder, harm)
    sign(folder)
    for told, _, _ in run_ranks(2, load, model, copy, None, DISTRIBUTED):
        assert file in told and "is refused, it could run code" in told and "system" in told
    assert not harm.path.exists()


def test_the_same_checkpoint_would_have_done_harm(copy: Path, tmp_path: Path) -> None:
    """Or the test above shows nothing."""
    harm, folder = Harm(tmp_path / "harm"), copy / "iter_0000003"
    put_into_object(folder, harm)

    def load_as_upstream() -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.load_common_state_dict(str(folder))

    alone(load_as_upstream)
    assert harm.path.exists()


def test_the_tools_run_nothing_either(model: Path, copy: Path, tmp_path: Path) -> None:
    harm = Harm(tmp_path / "harm")
    put_into_metadata(copy / "iter_0000003", harm)
    told = alone(torch_dist_to_hf, copy, tmp_path / "hf", model)
    assert ".metadata: is refused, it could run code: posix.system has no place there" in told
    assert "is refused" in alone(describe, copy)
    assert not harm.path.exists()


def test_the_tools_read_weights_beside_the_arguments_of_megatron_lm(model: Path, copy: Path, tmp_path: Path) -> None:
    """Its common state has a Namespace in it, which they never read."""
    folder = copy / "iter_0000003"
    put_into_object(folder, {"args": argparse.Namespace(lr=1.0), "iteration": 3})
    (folder / "manifest.json").unlink()
    assert alone(torch_dist_to_hf, copy, tmp_path / "hf", model) is None
