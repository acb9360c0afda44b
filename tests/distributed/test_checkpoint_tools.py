"""Hugging Face folders and Megatron torch_dist checkpoints: bit by bit there and back, and with Megatron's own code."""

import contextlib
import io
import json
import multiprocessing
import os
import queue
import runpy
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.models.build import build_model, transformer_config
from megatron_vespo.models.conversion import load_hf_weights
from megatron_vespo.models.convert import hf_to_torch_dist, torch_dist_to_hf, verify
from megatron_vespo.models.describe import describe
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.models.naming import named_weights
from megatron_vespo.models.registry import load_architecture
from tests.ranks import run_ranks
from tests.tiny_deepseek import make_tiny_sigmoid_moe
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.weights import assert_bits_equal, read_weights

TOOLS = Path(__file__).parents[2] / "tools"
SMALL = {"vocab_size": 50, "num_layers": 4}  # vocabulary padded to 64 in the models, to 128 in checkpoints
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
}
MODELS = ("moe", "dense", "tied", "deepseek")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "moe": make_tiny_qwen3_moe(root / "moe", **SMALL),
        "dense": make_tiny_qwen3(root / "dense", **SMALL),
        "tied": make_tiny_qwen3(root / "tied", tie_word_embeddings=True, **SMALL),
        "deepseek": make_tiny_sigmoid_moe(
            root / "deepseek", "deepseek_v3"
        ),  # layers of two kinds, which Megatron names one by one
    }


def alone(function: Any, *args: Any) -> Any:
    """What the function returns in a process of its own, as the tools run it; a UserError as its message."""

    def run() -> Any:
        parallel.initialize_alone()
        try:
            return function(*args)
        except UserError as error:
            return str(error)

    return run_ranks(1, run, initialize=False)[0]


@pytest.fixture(scope="module")
def checkpoints(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders as Megatron checkpoints, with a file for every few tensors."""
    root = tmp_path_factory.mktemp("checkpoints")

    def convert() -> None:
        for name, folder in folders.items():
            hf_to_torch_dist(folder, root / name, file_bytes=20_000)

    assert alone(convert) is None
    return {name: root / name for name in folders}


def build(folder: Path, megatron: dict[str, Any]) -> Any:
    """This rank's chunks, scrambled."""
    architecture = load_architecture(folder)
    config = transformer_config(architecture, megatron, "local")
    chunks = build_model(architecture, config, layer_spec="local", make_vocab_size_divisible_by=16)
    for weight in named_weights(chunks):
        weight.data.fill_(7.0)
    return chunks


def sharded(chunks: Any) -> dict[str, Any]:
    """As Megatron-LM has it: ``model``, or ``model0`` and on for the chunks of an interleaved pipeline."""
    names = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}


# --- there and back ---


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back_is_exact(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path, model: str
) -> None:
    source, middle, target = folders[model], checkpoints[model], tmp_path / "hf"

    def convert() -> None:
        verify(source, middle, dtype=None, written="megatron")
        torch_dist_to_hf(middle, target, source, shard_bytes=30_000)
        verify(target, middle, dtype=None, written="hf")

    assert alone(convert) is None
    assert len(list(target.glob("*.safetensors"))) > 2, "no file is as large as the model"
    assert (target / "model.safetensors.index.json").is_file()
    assert_bits_equal(read_weights(target), read_weights(source))
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        if (source / name).exists():
            assert (target / name).read_bytes() == (source / name).read_bytes()


def common_state(folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing  # after megatron_vespo.parallel

    return dist_checkpointing.load_common_state_dict(str(folder))


def test_the_folder_is_megatrons(folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = checkpoints["moe"]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert sorted(path.name for path in folder.iterdir()) == ["latest_checkpointed_iteration.txt", "release"]
    assert len(list((folder / "release").glob("*.distcp"))) > 3
    target = tmp_path / "numbered"
    assert alone(partial(hf_to_torch_dist, iteration=7), folders["dense"], target) is None
    assert (target / "latest_checkpointed_iteration.txt").read_text() == "7"
    state = alone(common_state, target / "iter_0000007")
    assert (state["iteration"], state["checkpoint_version"]) == (7, 3.0)


def test_weights_can_be_written_in_another_dtype(folders: dict[str, Path], tmp_path: Path) -> None:
    source = folders["deepseek"]

    def convert() -> None:
        hf_to_torch_dist(source, tmp_path / "mg", dtype=torch.bfloat16)
        verify(source, tmp_path / "mg", dtype=torch.bfloat16, written="megatron")
        torch_dist_to_hf(tmp_path / "mg", tmp_path / "hf", source)

    assert alone(convert) is None
    bias = "e_score_correction_bias"  # it chooses experts, and Megatron keeps it in float32
    want = {name: t if bias in name else t.bfloat16() for name, t in read_weights(source).items()}
    assert any(bias in name for name in want)
    assert_bits_equal(read_weights(tmp_path / "hf"), want)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config.get("torch_dtype", config.get("dtype")) == "bfloat16"


# --- Megatron's own code on the other side ---


def loaded_by_megatron(folder: Path, checkpoint: Path, megatron: dict[str, Any]) -> list[str]:
    """Names of the weights that Megatron loads differently from us."""
    from megatron.core import dist_checkpointing  # after megatron_vespo.parallel

    ours, theirs = build(folder, megatron), build(folder, megatron)
    load_hf_weights(ours, load_architecture(folder), HfReader(folder))
    state = dist_checkpointing.load(sharded(theirs), str(checkpoint / "release"))
    names = ["model"] if len(theirs) == 1 else [f"model{number}" for number in range(len(theirs))]
    for name, chunk in zip(names, theirs, strict=True):
        chunk.load_state_dict(state[name])
    pairs = zip(named_weights(ours), named_weights(theirs), strict=True)
    return [a.fill(a.pattern) for a, b in pairs if not torch.equal(a.data, b.data)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_loads_it_at_any_layout(folders: dict[str, Path], checkpoints: dict[str, Path], layout: str) -> None:
    size, megatron = LAYOUTS[layout]

    def load() -> dict[str, list[str]]:
        models = ("moe", "dense", "tied") if "VPP" in layout or "EP" not in layout else ("moe",)
        return {name: loaded_by_megatron(folders[name], checkpoints[name], megatron) for name in models}

    for different in run_ranks(size, load, **megatron):
        assert not any(different.values()), different


def save_with_megatron(folder: Path, target: Path, megatron: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing  # after megatron_vespo.parallel
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.Queue()  # else it starts a process that imports everything again
    chunks = build(folder, megatron)
    load_hf_weights(chunks, load_architecture(folder), HfReader(folder))
    (target / "iter_0000003").mkdir(parents=True, exist_ok=True)
    parallel.barrier()
    dist_checkpointing.save({**sharded(chunks), "iteration": 3}, str(target / "iter_0000003"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_megatron_saved_becomes_the_hf_folder(folders: dict[str, Path], tmp_path: Path, layout: str) -> None:
    size, megatron = LAYOUTS[layout]
    model = "tied" if layout == "PP2 VPP2" else "moe"
    run_ranks(size, save_with_megatron, folders[model], tmp_path / "mg", megatron, **megatron)
    (tmp_path / "mg" / "latest_checkpointed_iteration.txt").write_text("3")
    assert alone(torch_dist_to_hf, tmp_path / "mg", tmp_path / "hf", folders[model]) is None
    assert_bits_equal(read_weights(tmp_path / "hf"), read_weights(folders[model]))


# --- a run that is killed, files that are damaged ---


def killed(function: Any, *args: Any) -> None:
    """Run it in a process that is killed at its tenth tensor."""
    told = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal told
        told += 1
        if told == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        parallel.initialize_alone()
        function(*args, progress=progress)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_run_leaves_nothing_that_looks_finished(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    source = folders["dense"]
    killed(partial(hf_to_torch_dist, file_bytes=1), source, tmp_path / "mg")
    killed(partial(torch_dist_to_hf, shard_bytes=1), checkpoints["dense"], tmp_path / "hf", source)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    assert all(".tmp-" in name for name in left)
    assert not list(tmp_path.rglob("latest_checkpointed_iteration.txt"))
    assert not list(tmp_path.rglob("metadata.json"))
    assert not list(tmp_path.rglob("*.index.json"))


def flip(file: Path) -> None:
    """Change a byte of the last tensor's data."""
    data = bytearray(file.read_bytes())
    at = len(data) - 3 if file.suffix == ".safetensors" else data.index(b"/data/0") + 200
    data[at] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-600])


@pytest.mark.parametrize("damage", [flip, cut])
def test_verify_finds_damage(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path, damage: Any
) -> None:
    shutil.copytree(checkpoints["dense"], tmp_path / "mg")
    damage(sorted((tmp_path / "mg" / "release").glob("__0_0.distcp"))[0])
    told = alone(partial(verify, dtype=None, written="megatron"), folders["dense"], tmp_path / "mg")
    assert "differ in" in told if damage is flip else "a file is damaged" in told, told

    shutil.copytree(folders["dense"], tmp_path / "hf")
    damage(tmp_path / "hf" / "model.safetensors")
    told = alone(partial(verify, dtype=None, written="hf"), tmp_path / "hf", checkpoints["dense"])
    assert "differ in" in told if damage is flip else "truncated" in told, told


def test_damaged_metadata_is_a_user_error(
    folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoints["dense"], tmp_path / "mg")
    cut(tmp_path / "mg" / "release" / ".metadata")
    told = alone(torch_dist_to_hf, tmp_path / "mg", tmp_path / "hf", folders["dense"])
    assert ".metadata: cannot be read" in told


# --- what does not fit ---


def edited(folder: Path, target: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_errors_are_one_clear_line(folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    dense, mg = folders["dense"], checkpoints["dense"]
    unknown = edited(dense, tmp_path / "unknown", {"model_type": "gpt_neox"})
    longer = edited(dense, tmp_path / "longer", {"num_hidden_layers": 5})
    extra = edited(dense, tmp_path / "extra", {})
    save_file({**read_weights(dense), "model.more.weight": torch.zeros(2)}, extra / "model.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    new = tmp_path / "new"

    def messages() -> dict[str, str]:
        calls = {
            "unknown": partial(hf_to_torch_dist, unknown, new),
            "missing": partial(hf_to_torch_dist, longer, new),
            "extra": partial(hf_to_torch_dist, extra, new),
            "exists": partial(hf_to_torch_dist, dense, mg),
            "no source": partial(torch_dist_to_hf, tmp_path / "empty", new, dense),
            "shape": partial(torch_dist_to_hf, mg, new, longer),
            "other model": partial(torch_dist_to_hf, mg, new, folders["moe"]),
            "another's": partial(hf_to_torch_dist, dense, tmp_path / "papers", overwrite=True),
            "itself": partial(torch_dist_to_hf, mg, mg, dense, overwrite=True),
        }
        told = {}
        for name, call in calls.items():
            try:
                call()
                told[name] = ""
            except UserError as error:
                told[name] = str(error)
        return told

    told = alone(messages)
    wanted = {
        "unknown": "gpt_neox",
        "missing": "tensor model.layers.4.input_layernorm.weight is missing",
        "extra": "model.more.weight: not weights of this architecture",
        "exists": "exists; give another folder, or --overwrite",
        "no source": "not a Megatron checkpoint",
        "shape": "has shape (4, ",
        "other model": "has no decoder.layers.mlp.experts.",
        "another's": "is no checkpoint, so --overwrite does not replace it",
        "itself": "holds the source",
    }
    for name, text in wanted.items():
        assert text in told[name], (name, told[name])
        assert "\n" not in told[name]
    assert not new.exists()
    assert (tmp_path / "papers" / "thesis.txt").exists()


# --- the tools ---


def command(tool: str, *args: Any) -> tuple[int, str]:
    """Exit status and output of a tool, run in a fork: its imports would take longer than all it does."""
    sys.argv = [tool, *map(str, args)]
    sys.path.insert(0, str(TOOLS))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        except SystemExit as exit_:
            return int(exit_.code or 0), output.getvalue()
    raise AssertionError("the tool did not exit")


def test_the_commands(folders: dict[str, Path], tmp_path: Path) -> None:
    def tool(name: str, *args: Any) -> tuple[int, str]:
        return run_ranks(1, command, name, *args, initialize=False)[0]

    source, mg, hf = folders["moe"], tmp_path / "mg", tmp_path / "hf"
    status, output = tool("hf_to_megatron.py", source, mg, "--verify", "--iteration", 2, "--file-size", "1MB")
    assert status == 0, output
    assert "written and verified in" in output
    assert "peak memory" in output
    status, output = tool("megatron_to_hf.py", mg, hf, "--hf", source, "--max-shard-size", "1MB", "--verify")
    assert status == 0, output
    assert_bits_equal(read_weights(hf), read_weights(source))
    status, output = tool("megatron_to_hf.py", mg, hf, "--hf", source)
    assert status == 1
    assert "exists" in output
    assert tool("megatron_to_hf.py", mg, hf, "--hf", source, "--overwrite")[0] == 0
    flip(sorted(hf.glob("*.safetensors"))[0])
    status, output = tool("megatron_to_hf.py", mg, hf, "--hf", source, "--verify-only")
    assert status == 1
    assert "differ in" in output
    status, output = tool("inspect_checkpoint.py", mg)
    assert status == 0
    assert "iteration:    2" in output


def test_inspection(folders: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    moe = read_weights(folders["moe"])
    parameters = sum(tensor.numel() for tensor in moe.values())
    hf = describe(folders["moe"])
    assert "architecture: qwen3_moe" in hf
    assert f"parameters:   {parameters:,} in {len(moe)} tensors" in hf
    assert "16 x float32   model.layers.*.mlp.experts.*.up_proj.weight [32, 32]" in hf
    assert "model.layers.3.mlp.experts.2.up_proj.weight [32, 32]" in describe(folders["moe"], every_tensor=True)
    megatron = describe(checkpoints["moe"])
    assert "iteration:    release" in megatron
    assert "decoder.layers.mlp.experts.experts.linear_fc1.weight [4, 4, 64, 32]" in megatron
    padding = 2 * (128 - 50) * 32
    assert f"parameters:   {parameters + padding:,} in" in megatron
    with pytest.raises(UserError, match=r"neither \*\.safetensors nor a Megatron checkpoint"):
        describe(tmp_path)
