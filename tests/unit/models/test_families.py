"""What each family's config.json means, in the spellings of transformers 4 and 5, and what of it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.registry import load_architecture
from tests.tiny_families import FAMILIES, LLAMA3_ROPE, make_tiny

Config = dict[str, Any]
Read = Callable[[Config], Architecture]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    root = tmp_path_factory.mktemp("models")
    return {name: json.loads((make_tiny(root / name, name) / "config.json").read_text()) for name in FAMILIES}


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read_config(config: Config) -> Architecture:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return load_architecture(tmp_path)

    return read_config


@pytest.mark.parametrize(
    "family, expected",
    [
        ("qwen2", {"add_qkv_bias": True, "add_bias_linear": False, "qk_layernorm": False, "kv_channels": 8}),
        (
            "qwen2_moe",
            {
                "add_qkv_bias": True,
                "moe_router_pre_softmax": True,
                "moe_ffn_hidden_size": 32,
                "moe_shared_expert_intermediate_size": 48,
                "moe_shared_expert_gate": True,
            },
        ),
        (
            "mixtral",
            {
                "add_qkv_bias": False,
                "num_moe_experts": 4,
                "moe_router_topk": 2,
                "moe_router_pre_softmax": False,
                "moe_ffn_hidden_size": 64,
                "kv_channels": 8,
            },
        ),
        ("llama", {"add_qkv_bias": False, "add_bias_linear": False, "kv_channels": 16, "ffn_hidden_size": 64}),
    ],
)
def test_facts(configs: dict[str, Config], read: Read, family: str, expected: Config) -> None:
    facts = read(configs[family]).transformer_config()
    assert {name: facts.get(name) for name in expected} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_transformers_mean_the_same(configs: dict[str, Config], read: Read, family: str) -> None:
    old = {"rope_scaling": None} | configs[family]
    new = {name: value for name, value in old.items() if name not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_theta": old["rope_theta"], **(old["rope_scaling"] or {"rope_type": "default"})}
    if "num_experts" in new:
        new["num_local_experts"] = new.pop("num_experts")
    assert read(new) == read(old)
    assert read(new).rope_theta == old["rope_theta"]


def test_where_both_spellings_are_there_they_must_agree(configs: dict[str, Config], read: Read) -> None:
    agreeing = {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}}
    assert read(configs["llama"] | agreeing) == read(configs["llama"])
    with pytest.raises(UserError, match=r"rope_theta=500000\.0, but rope_parameters say 10000\.0; keep one of them"):
        read(configs["llama"] | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 1e4}})
    with pytest.raises(UserError, match=r"rope_scaling=.*llama3.*, but rope_parameters say None"):
        read(configs["llama"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}})


def test_an_absent_head_dim_is_computed_as_the_model_code_does(configs: dict[str, Config], read: Read) -> None:
    config = {name: value for name, value in configs["llama"].items() if name != "head_dim"}
    assert read(config).config["head_dim"] == 8
    assert read(config | {"head_dim": None}).config["head_dim"] == 8
    del config["hidden_size"]
    with pytest.raises(UserError, match="'hidden_size' is missing"):
        read(config)


def test_llama3_rope_reaches_the_model(configs: dict[str, Config], read: Read) -> None:
    options = {"position_embedding_type": "rope", "rotary_base": 500000.0, "rotary_percent": 1.0}
    assert read(configs["llama"]).rope_options == options | {"rope_scaling": True, "rope_scaling_factor": 32.0}
    old_key = {"type" if name == "rope_type" else name: value for name, value in LLAMA3_ROPE.items()}
    assert read(configs["llama"] | {"rope_scaling": old_key}) == read(configs["llama"])
    for plain in (None, {"type": "default"}, {"rope_type": "default"}):
        assert read(configs["llama"] | {"rope_scaling": plain}).rope_options == options


@pytest.mark.parametrize(
    "family, field, value",
    [
        *((family, "hidden_act", "gelu") for family in FAMILIES),
        *((family, "attention_dropout", 0.1) for family in FAMILIES),
        *((family, "rope_scaling", {"rope_type": "yarn", "factor": 4.0}) for family in FAMILIES),
        ("qwen2", "use_sliding_window", True),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen2", "use_mrope", True),
        ("qwen2", "rope_scaling", LLAMA3_ROPE),
        ("qwen2_moe", "use_sliding_window", True),
        ("qwen2_moe", "qkv_bias", False),
        ("qwen2_moe", "decoder_sparse_step", 2),
        ("qwen2_moe", "mlp_only_layers", [0]),
        ("mixtral", "sliding_window", 4096),
        ("mixtral", "router_jitter_noise", 0.1),
        ("llama", "attention_bias", True),
        ("llama", "mlp_bias", True),
        ("llama", "pretraining_tp", 2),
        ("llama", "rope_scaling", {"rope_type": "linear", "factor": 4.0}),
        ("llama", "rope_scaling", {"type": "dynamic", "factor": 4.0}),
        ("llama", "rope_scaling", LLAMA3_ROPE | {"low_freq_factor": 2.0}),
        ("llama", "rope_scaling", LLAMA3_ROPE | {"high_freq_factor": 8.0}),
        ("llama", "rope_scaling", LLAMA3_ROPE | {"original_max_position_embeddings": 4096}),
        ("llama", "rope_scaling", LLAMA3_ROPE | {"attention_factor": 1.1}),
        ("llama", "rope_scaling", {name: value for name, value in LLAMA3_ROPE.items() if name != "factor"}),
    ],
)
def test_what_the_code_does_not_honour_is_refused(
    configs: dict[str, Config], read: Read, family: str, field: str, value: Any
) -> None:
    with pytest.raises(UserError, match=f"{field}=.* is not supported for {family}"):
        read(configs[family] | {field: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_and_missing_fields_are_named(configs: dict[str, Config], read: Read, family: str) -> None:
    with pytest.raises(UserError, match=f"'attention_sink' is not a field that the {family} code honours"):
        read(configs[family] | {"attention_sink": True})
    for name in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "vocab_size"):
        with pytest.raises(UserError, match=f"'{name}' is missing; a {family} config must have it"):
            read({key: value for key, value in configs[family].items() if key != name})
