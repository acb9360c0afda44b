"""Hugging Face weights into the sharded model and out again, bit by bit."""

import json
import re
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.models.build import build_model, transformer_config
from megatron_vespo.models.conversion import load_hf_weights
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.hf_files import HfReader, HfWriter
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.policy.checkpoint import save_hf
from tests.ranks import run_ranks
from tests.tiny_families import make_tiny
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.weights import Tensors, assert_bits_equal, read_weights

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2 EP2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
    ),
    "PP2 EP2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "PP2 VPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "ETP2": (2, {"expert_tensor_parallel_size": 2}),
    "EP2 ETP2": (4, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
}
BUCKETS = (1, 10_000, 2**30)
SMALL = {"vocab_size": 50, "num_layers": 4}  # vocabulary padded to 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = [
        make_tiny_qwen3_moe(root / "moe", **SMALL),
        make_tiny_qwen3_moe(root / "moe_tied", tie_word_embeddings=True, **SMALL),
        make_tiny_qwen3(root / "dense", **SMALL),
        make_tiny_qwen3(root / "dense_tied", tie_word_embeddings=True, **SMALL),
        make_tiny(root / "qwen2", "qwen2", **SMALL),
        make_tiny(root / "qwen2_moe", "qwen2_moe", **SMALL),
        make_tiny(root / "mixtral_moe", "mixtral", **SMALL),
        make_tiny(root / "llama", "llama", tie_word_embeddings=True, **SMALL),
    ]
    return {folder.name: folder for folder in made}


def load(folder: Path, megatron: dict[str, Any], reader: HfReader | None = None) -> Any:
    """This rank's chunks of the model, their weights scrambled first so that only loading can put them right."""
    architecture = load_architecture(folder)
    config = transformer_config(architecture, megatron, "local")
    chunks = build_model(architecture, config, layer_spec="local", make_vocab_size_divisible_by=16)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)
    load_hf_weights(chunks, architecture, reader or HfReader(folder))
    return chunks


def exporter(folder: Path, megatron: dict[str, Any], bucket_bytes: int = 10_000) -> HfExporter:
    return HfExporter(load(folder, megatron), load_architecture(folder), bucket_bytes)


def stream_all(stream: HfExporter) -> tuple[Tensors, int]:
    """The tensors by name and the number of buckets that had any."""
    tensors: Tensors = {}
    buckets = 0
    for bucket in stream.stream():
        assert not tensors.keys() & {name for name, _ in bucket}
        tensors.update((name, tensor.clone()) for name, tensor in bucket)
        buckets += bool(bucket)
    return tensors, buckets


# --- there and back ---


def round_trips(folders: Iterable[Path], megatron: dict[str, Any]) -> list[tuple[Tensors, int, Tensors]]:
    """For each folder: tensors and buckets at the smallest bucket size, and the tensors again; every size agrees."""
    results = []
    for folder in folders:
        chunks, architecture = load(folder, megatron), load_architecture(folder)
        first, buckets = stream_all(HfExporter(chunks, architecture, BUCKETS[0]))
        for size in BUCKETS[1:]:
            stream = HfExporter(chunks, architecture, size)
            again, fewer = stream_all(stream)
            assert fewer <= buckets
            assert_bits_equal(again, first)
        results.append((first, buckets, stream_all(stream)[0]))
    return results


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_exact(folders: dict[str, Path], layout: str, bf16: bool) -> None:
    size, megatron = LAYOUTS[layout]
    megatron = megatron | ({"bf16": True} if bf16 else {})
    names = [name for name in folders if "moe" in name or "EP" not in layout]
    ranks = run_ranks(size, partial(round_trips, [folders[name] for name in names], megatron), **megatron)
    for number, name in enumerate(names):
        want = read_weights(folders[name])
        if bf16:
            want = {key: tensor.bfloat16() for key, tensor in want.items()}
        tensors, buckets, again = ranks[0][number]
        assert_bits_equal(tensors, want)
        assert_bits_equal(again, want)
        assert buckets > 10, "one weight is larger than the smallest bucket"
        assert all(not ranks[rank][number][0] for rank in range(1, size)), "only rank 0 puts tensors together"


def vocabulary_padding(folder: Path) -> Tensor:
    return load(folder, {})[0].embedding.word_embeddings.weight.detach().clone()


def test_padding_of_the_vocabulary_is_zero(folders: dict[str, Path]) -> None:
    (embedding,) = run_ranks(1, vocabulary_padding, folders["dense"])
    assert embedding.shape[0] == 64
    assert embedding[50:].abs().sum() == 0
    assert torch.equal(embedding[:50], read_weights(folders["dense"])["model.embed_tokens.weight"])


def export_with_spoiled_copy(folder: Path, megatron: dict[str, Any]) -> Tensors:
    """Of tied embeddings the first stage's weight is the one that counts."""
    chunks, architecture = load(folder, megatron), load_architecture(folder)
    if parallel.is_last_stage():
        with torch.no_grad():
            chunks[-1].output_layer.weight.fill_(9.0)
    return stream_all(HfExporter(chunks, architecture))[0]


def test_the_last_stages_copy_of_tied_embeddings_is_not_exported(folders: dict[str, Path]) -> None:
    size, megatron = LAYOUTS["PP2"]
    tensors, _ = run_ranks(size, export_with_spoiled_copy, folders["dense_tied"], megatron, **megatron)
    assert_bits_equal(tensors, read_weights(folders["dense_tied"]))


# --- every rank reads its slices only ---


class CountingReader(HfReader):
    """Remembers how many elements of each tensor were read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.elements: dict[str, int] = {}

    def read(self, name: str, dim: int, start: int, rows: int) -> Tensor:
        part = super().read(name, dim, start, rows)
        self.elements[name] = self.elements.get(name, 0) + part.numel()
        return part


def elements_read(folder: Path, megatron: dict[str, Any]) -> dict[str, int]:
    reader = CountingReader(folder)
    load(folder, megatron, reader)
    return reader.elements


@pytest.mark.parametrize("layout, model, shared", [("EP2", "moe", "mlp.experts"), ("TP2", "dense", "proj")])
def test_a_rank_reads_only_its_slices(folders: dict[str, Path], layout: str, model: str, shared: str) -> None:
    size, megatron = LAYOUTS[layout]
    ranks = run_ranks(size, elements_read, folders[model], megatron, **megatron)
    numel = {name: tensor.numel() for name, tensor in read_weights(folders[model]).items()}
    split = [name for name in numel if shared in name]
    assert split
    for read in ranks:
        assert sum(read.get(name, 0) for name in split) == sum(numel[name] for name in split) // 2
    for name in split:
        assert sum(read.get(name, 0) for read in ranks) == numel[name]
    embedding = "model.embed_tokens.weight"
    rows = {"EP2": [50, 50], "TP2": [32, 18]}[layout]
    assert [read[embedding] // 32 for read in ranks] == rows


# --- checkpoints that do not fit ---


def edited(folder: Path, target: Path, **changes: Tensor | None) -> Path:
    """A copy with tensors replaced, added or (None) removed; ``__`` stands for a dot."""
    shutil.copytree(folder, target)
    weights = read_weights(target)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, target / "model.safetensors")
    return target


def refusals(folders: list[Path]) -> list[str]:
    messages = []
    for folder in folders:
        try:
            load(folder, {})
            messages.append("")
        except UserError as error:
            messages.append(str(error))
    return messages


def test_a_checkpoint_that_does_not_fit_names_the_tensor(folders: dict[str, Path], tmp_path: Path) -> None:
    dense, up, q = folders["dense"], "model__layers__1__mlp__up_proj__weight", "model__layers__0__self_attn__q_proj"
    variants = {
        "missing": edited(dense, tmp_path / "missing", **{up: None}),
        "shape": edited(dense, tmp_path / "shape", **{f"{q}__weight": torch.zeros(64, 31)}),
        "unread": edited(dense, tmp_path / "unread", **{f"{q}__bias": torch.zeros(64)}),
        "fits": dense,
        "tied copy": edited(folders["dense_tied"], tmp_path / "tied", lm_head__weight=torch.zeros(50, 32)),
        "expert": edited(
            folders["mixtral_moe"],
            tmp_path / "expert",
            model__layers__2__block_sparse_moe__experts__3__w3__weight=None,
        ),
        "fifth expert": edited(
            folders["qwen2_moe"],
            tmp_path / "fifth",
            model__layers__0__mlp__experts__4__up_proj__weight=torch.zeros(32, 32),
        ),
        "bias": edited(folders["qwen2"], tmp_path / "bias", model__layers__3__self_attn__k_proj__bias=None),
        "bias shape": edited(
            folders["qwen2"], tmp_path / "bias_shape", model__layers__0__self_attn__k_proj__bias=torch.zeros(32)
        ),
    }
    (messages,) = run_ranks(1, refusals, list(variants.values()))
    told = dict(zip(variants, messages, strict=True))
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in told["missing"]
    assert "model.layers.0.self_attn.q_proj.weight has shape (64, 31), config.json says (64, 32)" in told["shape"]
    assert "no rank read model.layers.0.self_attn.q_proj.bias" in told["unread"]
    assert told["fits"] == told["tied copy"] == ""
    assert "tensor model.layers.2.block_sparse_moe.experts.3.w3.weight is missing" in told["expert"]
    assert "no rank read model.layers.0.mlp.experts.4.up_proj.weight" in told["fifth expert"]
    assert "tensor model.layers.3.self_attn.k_proj.bias is missing" in told["bias"]
    assert "model.layers.0.self_attn.k_proj.bias has shape (32,), config.json says (16,)" in told["bias shape"]


def export_all(folders: list[Path], megatron: dict[str, Any]) -> list[Tensors]:
    return [stream_all(exporter(folder, megatron))[0] for folder in folders]


def test_one_changed_element_shows_in_its_tensor_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    good = read_weights(folders["qwen2_moe"])
    name = "model.layers.1.mlp.shared_expert.up_proj.weight"
    changed = good[name].clone()
    changed[-1, -1] += 2**-20
    folder = edited(folders["qwen2_moe"], tmp_path / "changed", **{name.replace(".", "__"): changed})
    size, megatron = LAYOUTS["TP2"]
    (exported,) = run_ranks(size, export_all, [folder], megatron, **megatron)[0]
    assert {key for key in good if not torch.equal(exported[key], good[key])} == {name}
    with pytest.raises(AssertionError, match=re.escape(name)):
        assert_bits_equal(exported, good)


# --- checkpoints in FP8 ---

FP8_BLOCK = (24, 20)  # borders of blocks, ranks, heads and groups all differ


def in_fp8(folder: Path, target: Path) -> tuple[Path, Tensors]:
    """The checkpoint with its attention and MLP matrices in FP8, and the weights that it stands for."""
    shutil.copytree(folder, target)
    rng = torch.Generator().manual_seed(0)
    stored, true = {}, read_weights(folder)
    for name, weight in true.items():
        if "_proj.weight" not in name:
            stored[name] = weight
            continue
        values = (weight * 300).to(torch.float8_e4m3fn)
        scales = (
            torch.rand([-(-n // size) for n, size in zip(weight.shape, FP8_BLOCK, strict=True)], generator=rng) + 0.5
        ) / 300
        stored |= {name: values, f"{name}_scale_inv": scales}
        wide = scales.repeat_interleave(FP8_BLOCK[0], 0).repeat_interleave(FP8_BLOCK[1], 1)
        true[name] = values.float() * wide[: weight.shape[0], : weight.shape[1]]
    save_file(stored, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": FP8_BLOCK}
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return target, true


@pytest.mark.parametrize("layout", ["1 rank", "TP2", "TP2 EP2"])
def test_an_fp8_checkpoint_is_loaded_as_what_it_stands_for(
    folders: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    names = ("moe", "qwen2_moe", "dense")[: 2 if "EP" in layout else 3]
    made = [in_fp8(folders[name], tmp_path / name) for name in names]
    size, megatron = LAYOUTS[layout]
    exported = run_ranks(size, export_all, [folder for folder, _ in made], megatron, **megatron)[0]
    for tensors, (_, true) in zip(exported, made, strict=True):
        assert_bits_equal(tensors, true)


def test_a_saved_fp8_checkpoint_is_a_plain_one(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, true = in_fp8(folders["dense"], tmp_path / "fp8")
    run_ranks(1, save_twice, folder, tmp_path / "out", {})
    saved = tmp_path / "out" / "step_2"
    assert_bits_equal(read_weights(saved), true)
    assert json.loads((saved / "config.json").read_text()) == json.loads((folders["dense"] / "config.json").read_text())


def test_broken_files_are_user_errors(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"model\.safetensors: not a valid safetensors file"):
        HfReader(tmp_path)
    whole = (folders["dense"] / "model.safetensors").read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 100):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors: not a valid safetensors file"):
            HfReader(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"names gone\.safetensors, which is missing"):
        HfReader(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        HfReader(empty)


# --- saving ---


def save_twice(source: Path, target: Path, megatron: dict[str, Any]) -> None:
    stream = exporter(source, megatron)
    save_hf(stream, target / "step_1", source)
    save_hf(stream, target / "step_2", source)


@pytest.mark.parametrize("layout, model", [("TP2", "dense"), ("EP2", "moe"), ("PP2", "moe_tied")])
def test_a_saved_folder_is_the_checkpoint(folders: dict[str, Path], tmp_path: Path, layout: str, model: str) -> None:
    size, megatron = LAYOUTS[layout]
    target = tmp_path / "checkpoints"
    run_ranks(size, save_twice, folders[model], target, megatron, **megatron)
    assert sorted(path.name for path in target.iterdir()) == ["latest", "step_1", "step_2"]
    assert (target / "latest").resolve() == (target / "step_2").resolve()
    for folder in (target / "step_1", target / "latest"):
        assert_bits_equal(read_weights(folder), read_weights(folders[model]))
        reader = HfReader(folder)
        assert reader.names == read_weights(folders[model]).keys()
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            assert (folder / name).read_bytes() == (folders[model] / name).read_bytes()


def test_large_checkpoints_are_split_over_files(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = read_weights(folders["dense"])
    writer = HfWriter(tmp_path, shard_bytes=20_000)
    writer.add(weights.items())
    writer.finish()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert_bits_equal(read_weights(tmp_path), weights)


def raises(error: Exception, *args: Any, **kwargs: Any) -> None:
    raise error


def save_and_fail(source: Path, target: Path, megatron: dict[str, Any]) -> list[str]:
    """Save well, then fail at each stage on rank 0, then save well again; the messages of the failures."""
    stream = exporter(source, megatron)
    save_hf(stream, target / "good", source)
    messages = []
    patched = ("__init__", "add", "finish")
    originals = {name: getattr(HfWriter, name) for name in patched}
    for name in patched:
        if parallel.is_main():
            setattr(HfWriter, name, lambda *args, **kwargs: raises(OSError("disk full")))
        try:
            save_hf(stream, target / "bad", source)
        except UserError as error:
            messages.append(str(error))
        setattr(HfWriter, name, originals[name])
    blocked = source / "config.json" / "checkpoints" / "bad"  # its parent cannot be made
    try:
        save_hf(stream, blocked, source)
    except UserError as error:
        messages.append(str(error))
    save_hf(stream, target / "again", source)
    return messages


def test_a_failed_save_is_an_error_on_every_rank_and_leaves_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    size, megatron = LAYOUTS["TP2"]
    target = tmp_path / "checkpoints"
    first, second = run_ranks(size, save_and_fail, folders["dense"], target, megatron, **megatron)
    assert first == second
    assert len(first) == 4
    assert all("failed: disk full; earlier checkpoints are untouched" in message for message in first[:3])
    assert sorted(path.name for path in target.iterdir()) == ["again", "good", "latest"]
    assert_bits_equal(read_weights(target / "again"), read_weights(folders["dense"]))


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    writer = HfWriter(tmp_path / "gone")  # safetensors reports it by an exception of its own
    writer.add([("a", torch.zeros(2))])
    with pytest.raises(OSError, match="No such file"):
        writer.finish()
