from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vespo import parallel
from megatron_vespo.errors import UserError
from megatron_vespo.megatron_options import padded_vocab_size
from megatron_vespo.models.build import (
    _ARCHITECTURE_FIELDS,
    build_model,
    ddp_config,
    optimizer_config,
    transformer_config,
)
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.upstream import megatron_fields
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3, make_tiny_qwen3_moe

REFUSED = {
    "megatron.hidden_size: fixed by the model": {"hidden_size": 64},
    "megatron.variable_seq_lengths: fixed by the model": {"variable_seq_lengths": False},
    "megatron.tensor_model_parallel_size: ": {"tensor_model_parallel_size": "two"},
    "megatron.recompute_granularity: ": {"recompute_granularity": 3},
    "megatron.layernorm_zero_centered_gamma: fixed by the model": {"layernorm_zero_centered_gamma": True},
    "megatron.moe_router_score_function: fixed by the model": {"moe_router_score_function": "sigmoid"},
    "megatron.moe_grouped_gemm: ": {"moe_grouped_gemm": "x"},
    "megatron.bf16 and megatron.fp16 exclude each other": {"bf16": True, "fp16": True},
    "megatron: TransformerConfig refuses these options: ": {"sequence_parallel": True},
}


def message(action: Callable[[], Any]) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return "nothing was refused"


def build_everything(folder: Path, dense: Path) -> dict[str, Any]:
    architecture = load_architecture(folder)
    results: dict[str, Any] = {"refused": {}}
    for section in REFUSED.values():
        results["refused"][str(section)] = message(lambda s=section: transformer_config(architecture, s, "local"))
    results["te"] = message(
        lambda: build_model(
            architecture,
            transformer_config(architecture, {}, "local"),
            layer_spec="transformer_engine",
            make_vocab_size_divisible_by=16,
        )
    )
    config = transformer_config(architecture, {"bf16": True, "moe_router_dtype": "fp32"}, "local")
    (model,) = build_model(architecture, config, layer_spec="local", make_vocab_size_divisible_by=48)
    results["bf16"] = {parameter.dtype for parameter in model.parameters()}
    results["embedding"] = tuple(model.embedding.word_embeddings.weight.shape)
    results["defaults"] = (config.moe_token_dispatcher_type, config.moe_aux_loss_coeff, config.variable_seq_lengths)
    results["overridden"] = transformer_config(architecture, {"moe_aux_loss_coeff": 0.5}, "local").moe_aux_loss_coeff
    results["padded"] = [
        padded_vocab_size(architecture.vocab_size, n, parallel.tensor_parallel_size()) for n in (1, 16, 60, 128)
    ]
    plain = load_architecture(dense)
    (model,) = build_model(
        plain, transformer_config(plain, {}, "local"), layer_spec="local", make_vocab_size_divisible_by=1
    )
    results["dense"] = sorted({type(layer.mlp).__name__ for layer in model.decoder.layers})
    return results


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    return run_ranks(1, build_everything, make_tiny_qwen3_moe(folder / "moe"), make_tiny_qwen3(folder / "dense"))[0]


@pytest.mark.parametrize("start", REFUSED)
def test_a_wrong_megatron_section_names_the_field(built: dict[str, Any], start: str) -> None:
    assert built["refused"][str(REFUSED[start])].startswith(start)


def test_transformer_engine_is_asked_for_by_name(built: dict[str, Any]) -> None:
    assert "use layer_spec: local" in built["te"]


def test_the_section_reaches_the_model(built: dict[str, Any]) -> None:
    assert built["bf16"] == {torch.bfloat16}
    assert built["defaults"] == ("alltoall", 0.0, True)
    assert built["overridden"] == 0.5
    assert built["dense"] == ["MLP"]


def test_the_vocabulary_is_padded(built: dict[str, Any]) -> None:
    assert built["padded"] == [64, 64, 120, 128]
    assert built["embedding"] == (96, 32)


def test_what_the_model_fixes_are_options_of_this_megatron() -> None:
    known = megatron_fields()
    assert known is not None
    assert known >= _ARCHITECTURE_FIELDS


def test_the_learning_rate_must_be_given() -> None:
    for section in ({}, {"lr": None}):
        with pytest.raises(UserError, match=r"megatron\.lr: missing"):
            optimizer_config(section)


def test_optimizer_and_gradient_buffers_take_their_fields() -> None:
    section = {"lr": 1e-3, "weight_decay": 0.0, "clip_grad": 2.0, "use_distributed_optimizer": True, "bf16": True}
    optimizer, ddp = optimizer_config(section), ddp_config(section)
    assert (optimizer.lr, optimizer.clip_grad, optimizer.params_dtype) == (1e-3, 2.0, torch.bfloat16)
    assert optimizer.use_distributed_optimizer and ddp.use_distributed_optimizer
    assert ddp.grad_reduce_in_fp32
    assert not ddp_config({"grad_reduce_in_fp32": False}).grad_reduce_in_fp32


@pytest.mark.parametrize(
    "section, field", [({"lr": "1e-3"}, "lr"), ({"lr": 1e-3, "clip_grad": "x"}, "clip_grad"), ({"lr": True}, "lr")]
)
def test_wrong_types_of_the_optimizer_are_named(section: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=rf"megatron\.{field}: "):
        optimizer_config(section)
