import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.registry import load_architecture
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe

Config = dict[str, Any]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "qwen3": json.loads((make_tiny_qwen3(folder / "dense") / "config.json").read_text()),
        "qwen3_moe": json.loads((make_tiny_qwen3_moe(folder / "moe") / "config.json").read_text()),
    }


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Config], Architecture]:
    def read_config(config: Config) -> Architecture:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return load_architecture(tmp_path)

    return read_config


Read = Callable[[Config], Architecture]


def without(config: Config, *names: str) -> Config:
    return {name: value for name, value in config.items() if name not in names}


def test_facts_of_the_moe_model(configs: dict[str, Config], read: Read) -> None:
    architecture = read(configs["qwen3_moe"])
    facts = architecture.transformer_config()
    expected = {
        "num_layers": 2,
        "hidden_size": 32,
        "kv_channels": 16,
        "num_query_groups": 2,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 32,
        "moe_router_pre_softmax": False,
        "qk_layernorm": True,
        "layernorm_epsilon": 1e-6,
    }
    assert expected.items() <= facts.items()
    assert (architecture.vocab_size, architecture.context_length) == (64, 512)
    assert (architecture.rope_theta, architecture.tied_embeddings) == (10000.0, False)


def test_probabilities_that_are_not_renormalised_come_before_the_top_k(configs: dict[str, Config], read: Read) -> None:
    architecture = read(configs["qwen3_moe"] | {"norm_topk_prob": False})
    assert architecture.transformer_config()["moe_router_pre_softmax"] is True


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_both_spellings_of_transformers_mean_the_same(configs: dict[str, Config], read: Read, family: str) -> None:
    old = without(configs[family], "rope_parameters") | {"rope_scaling": None, "rope_theta": 5e5}
    new = without(configs[family], "rope_theta")
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    if family == "qwen3_moe":
        new["num_local_experts"] = new.pop("num_experts")
    assert read(old) == read(new)
    assert read(new).rope_theta == 5e5


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_every_field_that_matters_must_be_there(configs: dict[str, Config], read: Read, family: str) -> None:
    required = ["num_hidden_layers", "head_dim", "rms_norm_eps", "vocab_size", "tie_word_embeddings"]
    required += ["num_experts_per_tok", "norm_topk_prob"] if family == "qwen3_moe" else []
    for name in required:
        with pytest.raises(UserError, match=f"'{name}' is missing; a {family} config must have it"):
            read(without(configs[family], name))
    with pytest.raises(UserError, match="'rope_theta' is missing"):
        read(without(configs[family], "rope_theta", "rope_parameters"))


def test_an_unknown_field_names_the_nearest(configs: dict[str, Config], read: Read) -> None:
    with pytest.raises(UserError, match=r"'head_dims' is not a field .*; did you mean 'head_dim'\?"):
        read(configs["qwen3"] | {"head_dims": 16})
    with pytest.raises(UserError, match="'num_experts' is not a field that the qwen3 code"):
        read(configs["qwen3"] | {"num_experts": 4})


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("use_sliding_window", True),
        ("rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("decoder_sparse_step", 2),
        ("mlp_only_layers", [0]),
    ],
)
def test_an_unsupported_value_is_refused(configs: dict[str, Config], read: Read, field: str, value: Any) -> None:
    config = without(configs["qwen3_moe"], "rope_parameters") | {field: value}
    with pytest.raises(UserError, match=f"{field}=.* is not supported for qwen3_moe"):
        read(config)


def test_scaled_rope_in_the_new_spelling_is_refused(configs: dict[str, Config], read: Read) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(UserError, match=r"rope_scaling=.*yarn.* is not supported"):
        read(configs["qwen3"] | {"rope_parameters": rope})


def test_folders_that_hold_no_known_model(configs: dict[str, Config], read: Read, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.hf_path: .* not found"):
        load_architecture(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model_type 'gpt2' is not supported; supported: .*qwen3, qwen3_moe"):
        read(configs["qwen3"] | {"model_type": "gpt2"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load_architecture(tmp_path)
