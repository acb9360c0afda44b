"""The Transformer Engine spec and FP8, as far as they go without a GPU.

What is in the second half needs Transformer Engine: it builds, loads and saves the real modules on the CPU.
"""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vespo.errors import UserError
from megatron_vespo.models.build import build_model, optimizer_config, transformer_config
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.layer_specs import APEX_WGRAD, DEEP_EP
from megatron_vespo.models.precision import _EXPERTS_ALONE, in_fp8, packed_alignment
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.models.torch_dist import SCHEMES, TorchDistModel
from megatron_vespo.models.untrusted import _check_extra_state
from tests.checkpoints import checkpoints_of, differences, state_of
from tests.policies import load_model, make_policy
from tests.ranks import run_ranks
from tests.tiny_deepseek import make_tiny_sigmoid_moe
from tests.tiny_families import FAMILIES, make_tiny
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe
from tests.transformer_engine import INSTALLED, build_without_gpu
from tests.weights import assert_bits_equal, read_weights

TE = "transformer_engine"
needs_te = pytest.mark.skipif(not INSTALLED, reason="needs Transformer Engine")
Models = dict[str, Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    return {
        "qwen3_moe": make_tiny_qwen3_moe(root / "qwen3_moe"),
        "qwen3": make_tiny_qwen3(root / "qwen3"),
        **{name: make_tiny(root / name, name) for name in FAMILIES},
        **{name: make_tiny_sigmoid_moe(root / name, name) for name in ("deepseek_v3", "glm4_moe")},
    }


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "nothing was refused"


# --- options ---


def options(folder: Path, section: dict[str, Any], layer_spec: str) -> dict[str, Any]:
    names = ("attention_backend", "moe_router_dtype", "moe_grouped_gemm", "bias_activation_fusion", "apply_rope_fusion")
    names += ("gradient_accumulation_fusion", "moe_permute_fusion", "moe_token_dispatcher_type")
    config = transformer_config(load_architecture(folder), section, layer_spec)
    return {name: vars(config)[name] for name in names}


def test_the_defaults_of_a_layer_spec_can_be_overridden(models: Models) -> None:
    (local,) = run_ranks(1, options, models["qwen3_moe"], {}, "local")
    (ours,) = run_ranks(1, options, models["qwen3_moe"], {}, TE)
    (changed,) = run_ranks(
        1, options, models["qwen3_moe"], {"attention_backend": "flash", "moe_router_dtype": None}, TE
    )
    assert not local["moe_grouped_gemm"] and local["moe_router_dtype"] is None and not local["bias_activation_fusion"]
    assert ours["moe_grouped_gemm"] and ours["moe_router_dtype"] == "fp32" and ours["bias_activation_fusion"]
    assert ours["attention_backend"].name == local["attention_backend"].name == "fused"
    assert ours["moe_permute_fusion"] == ours["apply_rope_fusion"] == INSTALLED
    assert not ours["gradient_accumulation_fusion"]
    assert changed["attention_backend"].name == "flash" and changed["moe_router_dtype"] is None


REFUSED = {
    "megatron.gradient_accumulation_fusion: true needs NVIDIA apex": {"gradient_accumulation_fusion": True},
    "megatron.moe_token_dispatcher_type: flex needs DeepEP": {"moe_token_dispatcher_type": "flex"},
    "megatron.moe_flex_dispatcher_backend: ncclep is not supported": {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "ncclep",
    },
    "megatron.fp8: needs a GPU and Transformer Engine": {"fp8": "e4m3", "bf16": True},
    "megatron.attention_backend: ": {"attention_backend": "fastest"},
}


@pytest.mark.parametrize("start", REFUSED)
def test_what_is_not_there_is_refused_by_name(start: str, models: Models) -> None:
    assert importlib.util.find_spec(APEX_WGRAD) is importlib.util.find_spec(DEEP_EP) is None

    def build() -> str:
        architecture = load_architecture(models["qwen3_moe"])
        return message(lambda: transformer_config(architecture, REFUSED[start], TE))

    assert run_ranks(1, build)[0].startswith(start)


def test_fp8_for_experts_alone_needs_experts(models: Models) -> None:
    section = {"fp8": "e4m3", "bf16": True}
    (refused,) = run_ranks(
        1, lambda: message(lambda: transformer_config(load_architecture(models["qwen3"]), section, TE))
    )
    assert refused.startswith("model.fp8_scope: experts, but the model has none")


def test_the_optimizer_is_that_of_weights_in_bfloat16() -> None:
    assert optimizer_config({"lr": 1e-6, "bf16": True, "fp8": "e4m3", "fp8_recipe": "mxfp8"}).fp8_recipe is None


@pytest.mark.parametrize(
    "section, alignment",
    [
        ({}, 1),
        ({"tensor_model_parallel_size": 4}, 1),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 4),
        ({"fp8": "e4m3", "fp8_recipe": "blockwise"}, 16),
        ({"fp8": "hybrid", "fp8_recipe": "tensorwise", "tensor_model_parallel_size": 2}, 16),
        (
            {
                "fp8": "hybrid",
                "fp8_recipe": "tensorwise",
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
            },
            32,
        ),
        ({"fp8": "e4m3", "fp8_recipe": "mxfp8", "tensor_model_parallel_size": 4, "sequence_parallel": True}, 128),
    ],
)
def test_every_rank_gets_tokens_in_multiples_of_what_fp8_wants(section: dict[str, Any], alignment: int) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, **section)
    assert packed_alignment(config) == alignment


def linear_names(folder: Path) -> list[str]:
    """Modules with weights of two dimensions."""
    (chunk,) = load_model(folder, {})
    return [name.rpartition(".")[0] for name, weight in chunk.named_parameters() if weight.dim() == 2]


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "glm4_moe"])
def test_experts_alone_are_in_fp8(name: str, models: Models) -> None:
    from megatron.core.quantization.quant_config import MatchContext, RecipeConfig

    recipe = RecipeConfig.from_config_dict(_EXPERTS_ALONE)
    (names,) = run_ranks(1, linear_names, models[name])
    chosen = {name for name in names if recipe.match_to_config_key(MatchContext(name, None)) == "fp8"}
    assert chosen == {name for name in names if ".local_experts." in name} != set()
    assert any("shared_experts" in name for name in names) == (name != "qwen3_moe")


# --- checkpoints ---


def local_keys(folder: Path) -> tuple[set[str], set[str], set[str]]:
    model = TorchDistModel(load_architecture(folder), 16)
    contents = model.contents({"singleton_local_shards": True})
    latent = "kv_lora_rank" in load_architecture(folder).config
    keys = {part.key for part in contents.parts}
    return keys, {part.key for part in contents.of_local_layers(latent).parts}, set(contents.objects)


def test_norms_have_the_names_of_transformer_engines_checkpoints(models: Models) -> None:
    (keys, local, objects), (latent, latent_local, _) = (
        run_ranks(1, local_keys, models[name])[0] for name in ("qwen3_moe", "deepseek_v3")
    )
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in keys
    assert "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight" in keys & local
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in local - keys
    for norm in ("final_layernorm", "layers.0.pre_mlp_layernorm", "layers.0.self_attention.q_layernorm"):
        assert any(key.startswith(f"decoder.{norm}._extra_state") for key in objects), norm
    dense, up = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "linear_q_up_proj.layer_norm_weight"
    assert {dense, f"decoder.layers.0.self_attention.{up}"} <= latent - latent_local
    assert {"decoder.layers.0.pre_mlp_layernorm.weight", "decoder.layers.0.self_attention.q_layernorm.weight"} <= (
        latent_local - latent
    )


def test_only_keys_change_between_the_implementations(models: Models) -> None:
    def parts() -> bool:
        contents = TorchDistModel(load_architecture(models["qwen3_moe"]), 16).contents()
        local = contents.of_local_layers(False)
        same = [replace(part, key="") for part in contents.parts] == [replace(part, key="") for part in local.parts]
        return same and contents.objects == local.objects

    assert run_ranks(1, parts) == [True]


# --- the real modules ---


def classes(folder: Path) -> dict[str, str]:
    build_without_gpu()
    (chunk,) = load_model(folder, {"bf16": True}, TE)
    return {name.removeprefix("decoder.layers.1."): type(module).__name__ for name, module in chunk.named_modules()}


ATTENTION = {
    "input_layernorm": "IdentityOp",
    "self_attention": "SelfAttention",
    "self_attention.core_attention": "TEDotProductAttention",
    "self_attention.linear_qkv": "TELayerNormColumnParallelLinear",
    "self_attention.linear_proj": "TERowParallelLinear",
}
EXPERTS = {
    "pre_mlp_layernorm": "RMSNorm",
    "mlp.router": "Router",
    "mlp.experts": "TEGroupedMLP",
    "mlp.experts.linear_fc1": "TEColumnParallelGroupedLinear",
    "mlp.experts.linear_fc2": "TERowParallelGroupedLinear",
}
CLASSES = {
    "qwen3_moe": ATTENTION
    | EXPERTS
    | {"self_attention.q_layernorm": "RMSNorm", "output_layer": "ColumnParallelLinear"},
    "qwen2_moe": ATTENTION | EXPERTS | {"mlp.shared_experts.linear_fc1": "TEColumnParallelLinear"},
    "qwen3": ATTENTION | {"pre_mlp_layernorm": "IdentityOp", "mlp.linear_fc1": "TELayerNormColumnParallelLinear"},
    "deepseek_v3": EXPERTS
    | {
        "input_layernorm": "RMSNorm",
        "self_attention": "MLASelfAttention",
        "self_attention.core_attention": "TEDotProductAttention",
        "self_attention.linear_q_down_proj": "TELinear",
        "self_attention.linear_kv_up_proj": "TELayerNormColumnParallelLinear",
        "decoder.layers.0.mlp.linear_fc1": "TELayerNormColumnParallelLinear",
    },
}


@needs_te
@pytest.mark.parametrize("name", CLASSES)
def test_layers_are_transformer_engines_with_this_router(name: str, models: Models) -> None:
    (found,) = run_ranks(1, classes, models[name])
    assert CLASSES[name].items() <= found.items()


def round_trip(folder: Path, section: dict[str, Any]) -> dict[str, torch.Tensor]:
    build_without_gpu()
    exporter = HfExporter(load_model(folder, section, TE), load_architecture(folder))
    return {name: tensor.clone() for tensors in exporter.stream() for name, tensor in tensors}


@needs_te
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3", *FAMILIES, "deepseek_v3", "glm4_moe"])
def test_every_weight_goes_in_and_out_bit_by_bit(name: str, models: Models) -> None:
    (exported,) = run_ranks(1, round_trip, models[name], {})
    assert_bits_equal(exported, read_weights(models[name]))


TENSOR_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": TENSOR_PARALLEL,
    "TP2 ETP2": TENSOR_PARALLEL | {"expert_tensor_parallel_size": 2},
    "TP2 EP2": TENSOR_PARALLEL | {"expert_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
}


@needs_te
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_so_it_does_in_shards(name: str, layout: str, models: Models) -> None:
    section = LAYOUTS[layout]
    exported, _ = run_ranks(2, round_trip, models[name], section, **section)
    assert_bits_equal(exported, read_weights(models[name]))


def keys_of_both(folder: Path) -> list[list[set[tuple[str, str]]]]:
    """For either spec and each of Megatron's ways of naming, what a checkpoint holds."""
    build_without_gpu()
    found = []
    for layer_spec in ("local", TE):
        (chunk,) = load_model(folder, {"bf16": True}, layer_spec)
        states = [chunk.sharded_state_dict(metadata=dict(scheme)).values() for scheme in SCHEMES]
        found.append([{(type(entry).__name__, entry.key) for entry in entries} for entries in states])
    return found


@needs_te
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3", *FAMILIES, "deepseek_v3", "glm4_moe"])
def test_checkpoints_of_both_specs_hold_the_same(name: str, models: Models) -> None:
    ((local, ours),) = run_ranks(1, keys_of_both, models[name])
    assert local == ours


def save_and_load(folder: Path, target: Path, saved: str, loaded: str) -> list[str]:
    build_without_gpu()
    section = {"use_distributed_optimizer": True, "bf16": True}
    policy = make_policy(folder, section, layer_spec=saved)
    for weight in policy.chunks[0].parameters():
        weight.data.add_(1)
    policy._optimizer.reload_model_params()
    checkpoints_of(policy, target).save(1, {})
    other = make_policy(folder, section, layer_spec=loaded)
    checkpoints_of(other, target).load(None)
    states = [{k: v for k, v in state_of(each).items() if "optimizer" not in k} for each in (policy, other)]
    if saved == loaded:
        return differences(*states)
    exported = [
        dict(pair for tensors in HfExporter(each.chunks, load_architecture(folder)).stream() for pair in tensors)
        for each in (policy, other)
    ]
    assert_bits_equal(*exported)
    return []


@needs_te
@pytest.mark.parametrize("saved, loaded", [(TE, TE), ("local", TE), (TE, "local")])
def test_either_spec_goes_on_from_the_others_checkpoint(
    saved: str, loaded: str, models: Models, tmp_path: Path
) -> None:
    assert run_ranks(1, save_and_load, models["qwen2_moe"], tmp_path, saved, loaded) == [[]]


# --- FP8 ---


def fp8_modules(
    folder: Path, section: dict[str, Any], scope: str, capability: tuple[int, int]
) -> tuple[str | None, set[str], set[str]]:
    """Recipe, and which linear layers multiply in FP8 and which do not."""
    build_without_gpu(capability)
    architecture = load_architecture(folder)
    config = transformer_config(architecture, {"bf16": True, **section}, TE, scope)
    (chunk,) = build_model(architecture, config, layer_spec=TE, make_vocab_size_divisible_by=16)
    linear = {name: module for name, module in chunk.named_modules() if hasattr(module, "will_execute_quantized")}
    chosen = {name for name, module in linear.items() if in_fp8(module)}
    assert not any(module.primary_weights_in_fp8 for module in linear.values())
    return config.fp8_recipe, chosen, linear.keys() - chosen


@needs_te
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_the_scope_decides_which_layers_are_in_fp8(name: str, models: Models, tmp_path: Path) -> None:
    folder = models[name]
    if name == "deepseek_v3":  # its tiny one has sizes that FP8 cannot multiply
        sizes = {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        }
        folder = make_tiny_sigmoid_moe(tmp_path, name, **sizes)
    run = [run_ranks(1, fp8_modules, folder, {"fp8": "e4m3"}, scope, (9, 0))[0] for scope in ("experts", "all")]
    (recipe, experts, rest), (_, everything, nothing) = run
    assert recipe == "blockwise"
    assert experts and all(".mlp.experts.linear_fc" in name for name in experts)
    assert not any(".mlp.experts." in name for name in rest)
    assert any("self_attention" in name for name in rest)
    assert everything == experts | rest and not nothing


@needs_te
@pytest.mark.parametrize(
    "capability, named, recipe",
    [
        ((8, 9), None, "tensorwise"),
        ((9, 0), None, "blockwise"),
        ((9, 0), "delayed", "delayed"),
        ((10, 0), None, "mxfp8"),
        ((12, 0), None, "tensorwise"),
    ],
)
def test_the_recipe_is_the_devices_own_unless_named(
    capability: tuple[int, int], named: str | None, recipe: str, models: Models
) -> None:
    section = {"fp8": "hybrid"} | ({} if named is None else {"fp8_recipe": named})
    assert run_ranks(1, fp8_modules, models["qwen3_moe"], section, "experts", capability)[0][0] == recipe


@needs_te
@pytest.mark.parametrize(
    "capability, named, words",
    [
        ((9, 0), "mxfp8", "compute capability 9.0) cannot: mxfp8: Device compute capability 10.0 or higher"),
        ((8, 9), "blockwise", "compute capability 8.9) cannot: blockwise: "),
        ((8, 0), None, "compute capability 8.0) cannot: tensorwise: "),
    ],
)
def test_a_recipe_that_the_device_cannot_run_is_refused(
    capability: tuple[int, int], named: str | None, words: str, models: Models
) -> None:
    section = {"fp8": "e4m3"} | ({} if named is None else {"fp8_recipe": named})
    (refused,) = run_ranks(1, lambda: message(lambda: fp8_modules(models["qwen3_moe"], section, "experts", capability)))
    assert words in refused


@needs_te
def test_layers_that_fp8_cannot_multiply_are_named(tmp_path: Path, models: Models) -> None:
    odd = make_tiny_qwen3_moe(tmp_path / "odd", moe_intermediate_size=40)
    for folder, scope, capability, words in (
        (odd, "experts", (9, 0), "mlp.experts.linear_fc2 has weights of 32 x 40 on this rank; the blockwise recipe"),
        (models["qwen2_moe"], "all", (10, 0), "needs multiples of 32"),
    ):
        (refused,) = run_ranks(
            1, lambda f=folder, s=scope, c=capability: message(lambda: fp8_modules(f, {"fp8": "e4m3"}, s, c))
        )
        assert words in refused


def delayed_state() -> None:
    """What a module of Transformer Engine saves with delayed scaling (pytorch/module/base.py, get_extra_state)."""
    from megatron.core.fp8_utils import get_fp8_recipe
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, fp8="hybrid", fp8_recipe="delayed")
    state = {"recipe": get_fp8_recipe(config), "scale_fwd": torch.ones(3), "extra_fp8_variables": {"num_gemms": 1}}
    content = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
    _check_extra_state(Path("file"), "key", content)
    with pytest.raises(UserError, match="could run code"):
        _check_extra_state(Path("file"), "key", torch.frombuffer(bytearray(pickle.dumps(print)), dtype=torch.uint8))


@needs_te
def test_the_state_of_delayed_scaling_passes_the_check_of_checkpoints() -> None:
    run_ranks(1, delayed_state)
