"""Weights quantised on push: the arithmetic, which tensors, and the format that is published."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_vespo.config_file import parse_config
from megatron_vespo.fp8_format import BLOCK, SCALE_SUFFIX, is_quantised, quantization_config
from megatron_vespo.models.export import NamedTensor, TensorSpec
from megatron_vespo.models.fp8 import LARGEST, dequantise, quantise_blocks, scale_shape
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.models.quantised import QuantisedExporter
from megatron_vespo.rollout.served_model import served_arguments, served_model
from tests.tiny_deepseek import make_tiny_sigmoid_moe
from tests.tiny_families import FAMILIES, make_tiny
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe

SIZES = st.tuples(st.integers(1, 20), st.integers(1, 20))
BLOCKS = st.tuples(st.integers(1, 9), st.integers(1, 9))


def restore(values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    return dequantise(values, scales, block, 0, 0)


@settings(deadline=None)
@given(SIZES, BLOCKS, st.integers(-60, 60), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_what_comes_back_is_within_the_bound(
    size: tuple[int, int], block: tuple[int, int], exponent: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Of all magnitudes within a block, so that some fall below what e4m3 resolves.
    weight = torch.randn(size, generator=generator) * 10 ** (3 * torch.rand(size, generator=generator) - 3)
    weight = (weight * 2.0**exponent).to(dtype)
    values, scales = quantise_blocks(weight, block)
    assert values.dtype == torch.float8_e4m3fn and values.shape == weight.shape
    assert scales.dtype == torch.float32 and scales.shape == scale_shape(size, block)
    assert values.float().isfinite().all() and (scales > 0).all()
    each = restore(torch.ones(size), scales, block)
    error = (restore(values, scales, block) - weight.float()).abs()
    assert (error <= torch.maximum(weight.float().abs() * 2**-4, each * 2**-10)).all()
    largest = torch.nn.functional.max_pool2d(weight.float().abs()[None], block, block, ceil_mode=True)[0]
    assert (largest <= LARGEST * scales).all() and (largest > LARGEST / 2 * scales).all(), "the range is used"


@settings(deadline=None)
@given(SIZES, BLOCKS, st.integers(0, 1000))
def test_what_e4m3_can_say_comes_back_as_it_was(size: tuple[int, int], block: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = (torch.randn(size, generator=generator) * 60).to(torch.float8_e4m3fn)
    powers = torch.exp2(torch.randint(-20, 20, scale_shape(size, block), generator=generator).float())
    weight = restore(stored, powers, block)
    # A block may have no large number: its scale is then a smaller one, of which these are multiples too.
    assert torch.equal(restore(*quantise_blocks(weight, block), block), weight)


@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38, -3e38, 448.0, 449.0, 2.0**-149])
def test_extreme_blocks_stay_finite(value: float) -> None:
    weight = torch.zeros(130, 129)
    weight[128:] = value
    values, scales = quantise_blocks(weight, BLOCK)
    assert values.float().isfinite().all() and scales.isfinite().all() and (scales > 0).all()
    assert not values[:128].float().any()
    if abs(value) > 1e-30:
        torch.testing.assert_close(restore(values, scales, BLOCK), weight, rtol=2**-4, atol=0)


class Stream:
    """The weights of a folder, a bucket for each file's half."""

    def __init__(self, folder: Path) -> None:
        tensors = list(load_file(folder / "model.safetensors").items())
        self.tensors = [tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]]

    @property
    def buckets(self) -> list[dict[str, TensorSpec]]:
        return [{name: TensorSpec(tuple(t.shape), t.dtype) for name, t in bucket} for bucket in self.tensors]

    def stream(self) -> Iterator[list[NamedTensor]]:
        yield from self.tensors

    def done(self) -> None:
        self.tensors = []


def test_what_is_pushed_is_a_published_checkpoint(tmp_path: Path) -> None:
    """A folder of the pushed tensors under the config that the server gets, read by the reader of such checkpoints."""
    source = make_tiny_qwen3_moe(tmp_path / "plain", hidden_size=160, moe_intermediate_size=130, head_dim=48)
    exporter = QuantisedExporter(Stream(source))
    pushed = [item for bucket in exporter.stream() for item in bucket]
    announced = [item for bucket in exporter.buckets for item in bucket.items()]
    assert [(name, TensorSpec(tuple(tensor.shape), tensor.dtype)) for name, tensor in pushed] == announced
    save_file(dict(pushed), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization_config()}))
    reader, plain = HfReader(tmp_path), load_file(source / "model.safetensors")
    assert reader.names == plain.keys()
    for name, weight in plain.items():
        read = reader.read(name, 0, 0, weight.shape[0])
        if is_quantised(name):
            assert 0 < (read - weight).abs().max() < 0.05 * weight.abs().max(), name
        else:
            assert torch.equal(read, weight), name


def names_in(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("families")
    folders = [make_tiny(root / name, name) for name in FAMILIES]
    folders += [make_tiny_sigmoid_moe(root / name, name) for name in ("deepseek_v3", "glm4_moe")]
    return [*folders, make_tiny_qwen3_moe(root / "qwen3_moe"), make_tiny_qwen3(root / "qwen3")]


# In a process of its own, which may import transformers: the model's parameters once its linear layers are in FP8.
CONVERT = """
import sys, json, torch
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
for folder in sys.argv[1:]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    before = {name: type(module).__name__ for name, module in model.named_modules()}
    model = replace_with_fp8_linear(model, ["lm_head"], FineGrainedFP8Config())
    print(json.dumps([n for n, m in model.named_modules() if type(m).__name__ != before.get(n)]))
"""


def test_the_linear_layers_that_transformers_quantises_are(families: list[Path]) -> None:
    run = subprocess.run([sys.executable, "-c", CONVERT, *map(str, families)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for folder, line in zip(families, run.stdout.splitlines(), strict=True):
        converted = {name for name in json.loads(line) if not name.endswith(("shared_expert_gate", "mlp.gate"))}
        ours = {module_of(name) for name in names_in(folder) if is_quantised(name)}
        assert ours == converted, folder.name


def module_of(name: str) -> str:
    """transformers has the experts of a layer in one module, and one word for Mixtral's."""
    module = name.removesuffix(".weight").replace("block_sparse_moe", "mlp")
    return module.partition(".experts.")[0] + ".experts" if ".experts." in module else module


def test_the_served_folder_has_all_but_the_weights(tmp_path: Path) -> None:
    source = make_tiny_qwen3_moe(tmp_path / "model")
    tree = {"run": {"name": "r", "folder": str(tmp_path)}, "model": {"hf_path": str(source)}}
    tree |= {"data": {"train": "d"}, "training": {"steps": 1}}
    assert served_model(parse_config(tree)) == source and served_arguments(parse_config(tree)) == {}
    config = parse_config(tree | {"sglang": {"quantization": "fp8"}})
    for _ in range(2):  # as a second node, or a run that is resumed
        folder = served_model(config)
        left_out = {path.name for path in source.iterdir()} - {path.name for path in folder.iterdir()}
        assert left_out == {"model.safetensors"}
        facts = json.loads((folder / "config.json").read_text())
        assert facts.pop("quantization_config") == quantization_config()
        assert facts == json.loads((source / "config.json").read_text())
        assert (folder / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert served_arguments(config) == {"load_format": "dummy"}
    assert SCALE_SUFFIX == "_scale_inv"


def test_shared_gpus_need_the_memory_saver(tmp_path: Path) -> None:
    tree = {"run": {"name": "r"}, "model": {"hf_path": "m"}, "data": {"train": "d"}, "training": {"steps": 1}}
    tree["placement"] = {"mode": "colocate"}
    assert served_arguments(parse_config(tree)) == {}
    tree["rollout"] = {"server": {"device": "cuda"}}
    assert served_arguments(parse_config(tree)) == {"enable_memory_saver": True}
