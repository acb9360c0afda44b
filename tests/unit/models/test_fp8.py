"""FP8 checkpoints against the plain arithmetic: stored value times its block's scale."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_vespo.errors import UserError
from megatron_vespo.models.fp8 import dequantise, scale_shape
from megatron_vespo.models.hf_files import HfReader, copy_companions
from megatron_vespo.models.registry import load_architecture
from tests.tiny_families import make_tiny

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}


def stored(rows: int, columns: int, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 values, the scales of their blocks, and the weight that they stand for, element by element."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    values = (torch.randn(rows, columns, generator=generator) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(scale_shape((rows, columns), block), generator=generator) + 0.5
    weight = values.float()
    for row in range(rows):
        for column in range(columns):
            weight[row, column] *= scales[row // block[0], column // block[1]]
    return values, scales, weight


@given(st.data())
def test_every_slice_is_multiplied_by_its_own_blocks(data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    block = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    values, scales, weight = stored(*size, block)
    dim = data.draw(st.integers(0, 1))
    start = data.draw(st.integers(0, size[dim] - 1))
    rows = data.draw(st.integers(1, size[dim] - start))
    first, last = start // block[dim], (start + rows - 1) // block[dim]
    part = dequantise(
        values.float().narrow(dim, start, rows), scales.narrow(dim, first, last - first + 1), block, dim, start
    )
    assert torch.equal(part, weight.narrow(dim, start, rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A folder with an FP8 weight of 300 x 200 in blocks of 128, a plain one, and the first one's true values."""
    root = tmp_path_factory.mktemp("fp8")
    values, scales, weight = stored(300, 200, (128, 128))
    tensors = {"a.weight": values, "a.weight_scale_inv": scales, "b.weight": torch.ones(3, dtype=torch.bfloat16)}
    save_file(tensors, root / "model.safetensors")
    (root / "config.json").write_text(json.dumps({"quantization_config": QUANTIZATION}))
    return root, weight


@pytest.mark.parametrize(
    "dim, start, rows", [(0, 0, 300), (1, 0, 200), (0, 100, 60), (0, 256, 44), (0, 127, 2), (1, 128, 72), (1, 130, 1)]
)
def test_slices_are_read_as_the_plain_weight(
    folder: tuple[Path, torch.Tensor], dim: int, start: int, rows: int
) -> None:
    root, weight = folder
    reader = HfReader(root)
    part = reader.read("a.weight", dim, start, rows)
    assert part.dtype == torch.float32
    assert torch.equal(part, weight.narrow(dim, start, rows))


def test_scales_are_part_of_their_weight_and_plain_weights_stay(folder: tuple[Path, torch.Tensor]) -> None:
    reader = HfReader(folder[0])
    assert reader.names == {"a.weight", "b.weight"}
    assert reader.shape("a.weight") == (300, 200)
    assert torch.equal(reader.read("b.weight", 0, 1, 2), torch.ones(2, dtype=torch.bfloat16))


def test_a_weight_without_the_right_scales_is_refused(tmp_path: Path) -> None:
    values, scales, _ = stored(20, 10, (8, 8))
    config = {"quantization_config": QUANTIZATION | {"weight_block_size": [8, 8]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a.weight": values}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"a\.weight is FP8; a\.weight_scale_inv and .* one of them is missing"):
        HfReader(tmp_path).read("a.weight", 0, 0, 20)
    save_file({"a.weight": values, "a.weight_scale_inv": scales[:2]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"a\.weight_scale_inv has shape \(2, 2\), its weight needs \(3, 2\)"):
        HfReader(tmp_path).read("a.weight", 0, 0, 20)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is FP8"):
        HfReader(tmp_path).read("a.weight", 0, 0, 20)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"quant_method": "gptq"}, "quant_method='gptq'"),
        ({"quant_method": "compressed-tensors"}, "quant_method='compressed-tensors'"),
        ({"quant_method": None}, "quant_method=None"),
        ({"fmt": "e5m2"}, "fmt='e5m2'"),
        ({"weight_block_size": None}, "weight_block_size=None"),
        ({"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
    ],
)
def test_other_quantisations_are_refused_by_name(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    folder = make_tiny(tmp_path, "qwen2")
    plain = load_architecture(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    assert load_architecture(folder) == plain
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION | change}))
    for read in (load_architecture, HfReader):
        with pytest.raises(UserError, match=rf"quantization_config\.{field} is not supported"):
            read(folder)


def test_the_copied_config_says_that_the_weights_are_plain(tmp_path: Path) -> None:
    source, target = make_tiny(tmp_path / "source", "qwen2"), tmp_path / "target"
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    copy_companions(source, target)
    assert json.loads((target / "config.json").read_text()) == config
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
