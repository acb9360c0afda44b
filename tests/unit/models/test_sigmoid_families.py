"""What the config.json of DeepSeek-V3 and GLM-4.5-MoE means, in the spellings of transformers 4 and 5."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vespo.errors import UserError
from megatron_vespo.models.deepseek_v3 import DEEPSEEK_V3
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.models.router import Router, with_router
from tests.tiny_deepseek import YARN, make_tiny_sigmoid_moe

Config = dict[str, Any]
Read = Callable[[Config], Architecture]
FAMILIES = ("deepseek_v3", "glm4_moe")
# As transformers 5.19 saves them.
SAVED: dict[str, Config] = {
    "deepseek_v3": {
        "head_dim": 8,
        "qk_head_dim": 20,
        "rope_interleave": True,
        "pretraining_tp": 1,
        "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10000.0},
    },
    "glm4_moe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    root = tmp_path_factory.mktemp("models")
    folders = {name: make_tiny_sigmoid_moe(root / name, name, num_layers=3) for name in FAMILIES}
    return {name: json.loads((folder / "config.json").read_text()) for name, folder in folders.items()}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_config(config: Config) -> Architecture:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return load_architecture(tmp_path)

    return read_config


def test_facts_of_the_experts_and_their_router(configs: dict[str, Config], read: Read) -> None:
    expected = {
        "num_moe_experts": 8,
        "moe_router_topk": 4,
        "moe_ffn_hidden_size": 16,
        "ffn_hidden_size": 48,
        "moe_shared_expert_intermediate_size": 32,
        "moe_layer_freq": [0, 1, 1],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
    }
    for family in FAMILIES:
        assert expected.items() <= read(configs[family]).transformer_config().items()
    groups = ("moe_router_num_groups", "moe_router_group_topk")
    assert [read(configs["deepseek_v3"]).transformer_config()[name] for name in groups] == [4, 2]
    assert [read(configs["glm4_moe"]).transformer_config()[name] for name in groups] == [None, None]


def test_facts_of_the_attention(configs: dict[str, Config], read: Read) -> None:
    expected = {
        "multi_latent_attention": True,
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_head_dim": 12,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 10,
        "rope_type": "yarn",
        "rotary_scaling_factor": 4.0,
        "mscale_all_dim": 0.7,
    }
    assert expected.items() <= read(configs["deepseek_v3"]).transformer_config().items()
    plain = read(configs["deepseek_v3"] | {"rope_scaling": None}).transformer_config()
    assert (plain["rope_type"], plain["rotary_base"], plain["mscale_all_dim"]) == ("rope", 10000.0, 0.0)
    glm = read(configs["glm4_moe"])
    assert glm.transformer_config()["add_qkv_bias"] and glm.transformer_config()["qk_layernorm"]
    assert glm.rope_options["rotary_percent"] == 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_transformers_mean_the_same(configs: dict[str, Config], read: Read, family: str) -> None:
    old = read(configs[family])
    new = {name: value for name, value in configs[family].items() if name not in ("rope_theta", "rope_scaling")}
    new = read(new | SAVED[family])
    assert old.transformer_config() == new.transformer_config()
    assert old.rope_options == new.rope_options


@pytest.mark.parametrize(
    "family, change",
    [
        *((family, change) for family in FAMILIES for change in ({"norm_topk_prob": False}, {"n_shared_experts": 0})),
        ("deepseek_v3", {"attention_bias": True}),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("deepseek_v3", {"moe_layer_freq": 2}),
        ("deepseek_v3", {"num_key_value_heads": 2}),
        ("deepseek_v3", {"rope_scaling": YARN | {"type": "linear"}}),
        ("deepseek_v3", {"rope_scaling": YARN | {"attention_factor": 1.0}}),
        ("deepseek_v3", {"rope_scaling": YARN | {"mscale_all_dim": 0}}),
        ("deepseek_v3", {"rope_scaling": {name: YARN[name] for name in YARN if name != "mscale"}}),
        ("deepseek_v3", {"rope_scaling": {name: YARN[name] for name in YARN if name != "beta_fast"}}),
        ("glm4_moe", {"rope_scaling": YARN}),
    ],
    ids=str,
)
def test_an_unsupported_value_is_refused_by_name(
    configs: dict[str, Config], read: Read, family: str, change: Config
) -> None:
    (field,) = change
    with pytest.raises(UserError, match=f"{field}=.* is not supported"):
        read(configs[family] | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 is not supported"),
        ({"topk_group": 4}, "num_experts_per_tok=4 with topk_group=4 is not supported: .* Megatron would take 1"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace=3 leaves no layer with experts"),
        ({"q_lora_rank": None}, "'q_lora_rank' is missing"),
        ({"kv_lora_ranks": 3}, "'kv_lora_ranks' is not a field .*; did you mean 'kv_lora_rank'"),
    ],
    ids=str,
)
def test_fields_that_do_not_fit_are_named(configs: dict[str, Config], read: Read, change: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(configs["deepseek_v3"] | change)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_layers_for_multi_token_prediction_are_left_out(
    configs: dict[str, Config], read: Read, family: str
) -> None:
    architecture = read(configs[family] | {"num_nextn_predict_layers": 1})
    left_out = [
        name
        for name in ("model.layers.2.x", "model.layers.3.x", "model.layers.4.x", "model.layers.3", "model.norm.weight")
        if architecture.family.left_out(architecture.config, name)
    ]
    assert left_out == ["model.layers.3.x", "model.layers.3"]
    without = read(configs[family])
    assert not without.family.left_out(without.config, "model.layers.3.x")


def test_down_projections_are_split_or_whole_as_the_layer_spec_has_them(configs: dict[str, Config], read: Read) -> None:
    config = read(configs["deepseek_v3"]).config
    (rule,) = (rule for rule in DEEPSEEK_V3.rules if "linear_kv_down_proj" in rule.mcore)
    assert not rule.layout(config, 2, 28).sharded, "Transformer Engine's"
    assert rule.layout(config, 2, 14).sharded, "Megatron's own"
    assert rule.layout(config, 2, 14).hf_rows(0) == 28


def test_the_router_is_put_behind_layers_with_experts_only() -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    experts = partial(MoELayer, submodules=MoESubmodules(experts=torch.nn.Identity))
    specs = [
        ModuleSpec(module=torch.nn.Identity, submodules=TransformerLayerSubmodules(mlp=mlp))
        for mlp in (experts, partial(torch.nn.Identity))
    ]
    block = with_router(TransformerBlockSubmodules(layer_specs=specs, layer_norm=torch.nn.LayerNorm))
    assert block.layer_specs[0].submodules.mlp.keywords["submodules"].router is Router
    assert block.layer_specs[1] is specs[1]
