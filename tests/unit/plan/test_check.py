from pathlib import Path
from typing import Any

import pytest

from megatron_vespo.config import Config
from megatron_vespo.config_file import parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.plan.check import check_plan
from megatron_vespo.plan.sizes import Facts, Parallelism

MOE = Facts(
    {
        "num_layers": 48,
        "hidden_size": 2048,
        "ffn_hidden_size": 6144,
        "num_attention_heads": 32,
        "num_query_groups": 4,
        "num_moe_experts": 128,
        "moe_ffn_hidden_size": 768,
    },
    vocab_size=151_936,
    context_length=40_960,
)
DENSE = Facts(
    {
        "num_layers": 36,
        "hidden_size": 4096,
        "ffn_hidden_size": 12_288,
        "num_attention_heads": 32,
        "num_query_groups": 8,
    },
    vocab_size=151_936,
    context_length=40_960,
)


def make_config(**sections: Any) -> Config:
    tree: dict[str, Any] = {
        "run": {"name": "r"},
        "model": {"hf_path": "m"},
        "data": {"train": "d"},
        "rollout": {"prompts_per_step": 256, "samples_per_prompt": 8, "max_new_tokens": 1024},
        "training": {"steps": 1, "minibatches_per_step": 8},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return parse_config(tree)


def refusal(facts: Facts, ranks: int = 8, **sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_plan(make_config(**sections), facts, ranks, min(ranks, 8))
    return str(caught.value)


def warnings(facts: Facts, ranks: int = 8, per_node: int = 8, **sections: Any) -> list[str]:
    return check_plan(make_config(**sections), facts, ranks, per_node)


def tensor(size: int, **more: Any) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size, "sequence_parallel": size > 1, **more}


def test_good_plans_pass_without_a_word() -> None:
    assert warnings(MOE, megatron={"expert_model_parallel_size": 8}) == []
    assert warnings(MOE, 16, megatron=tensor(4, expert_model_parallel_size=8, pipeline_model_parallel_size=2)) == []
    assert warnings(DENSE, megatron=tensor(8)) == []


@pytest.mark.parametrize(
    "facts, ranks, megatron, words",
    [
        (
            MOE,
            3,
            tensor(3),
            "=3 does not divide the model's 32 attention heads; use one of 1, 2,",
        ),
        (
            Facts({**MOE.transformer, "num_attention_heads": 12}, 1000, 100),
            6,
            tensor(6),
            "tensor_model_parallel_size=6 is neither a divisor nor a multiple of the model's 4 key-value heads; use one"
            " of 1, 2, 4, 12",
        ),
        (
            Facts({**DENSE.transformer, "ffn_hidden_size": 100}, 1000, 100),
            8,
            tensor(8),
            "tensor_model_parallel_size=8 does not divide the width 100 of the model's MLP; use one of 1, 2, 4, 5",
        ),
        (DENSE, 2, {"expert_model_parallel_size": 2}, "expert_model_parallel_size=2: the model has no experts"),
        (
            MOE,
            6,
            {"expert_model_parallel_size": 6},
            "=6 does not divide the model's 128 experts; use one of 1, 2",
        ),
        (MOE, 5, {"expert_tensor_parallel_size": 5}, "expert_tensor_parallel_size=5 does not divide the width 768"),
        (MOE, 4, {"tensor_model_parallel_size": 4}, "sequence_parallel=false: must be true for a mixture of experts"),
        (MOE, 4, {"sequence_parallel": True}, "sequence_parallel=true splits the sequence over tensor-parallel ranks"),
        (
            MOE,
            5,
            {"pipeline_model_parallel_size": 5},
            "_size=5 does not divide the model's 48 layers",
        ),
        (MOE, 5, {"pipeline_model_parallel_size": 2}, "does not divide the 5 ranks of this job"),
    ],
)
def test_what_megatron_would_refuse(facts: Facts, ranks: int, megatron: dict[str, Any], words: str) -> None:
    assert words in refusal(facts, ranks, megatron=megatron)


def test_everything_wrong_is_told_at_once() -> None:
    lines = refusal(MOE, 6, megatron={"tensor_model_parallel_size": 3, "expert_model_parallel_size": 6}).splitlines()
    assert len(lines) == 3
    assert [line.split("=")[0] for line in lines] == [
        "megatron.tensor_model_parallel_size",
        "megatron.expert_model_parallel_size",
        "megatron.sequence_parallel",
    ]


@pytest.mark.parametrize(
    "facts, ranks, sections, words",
    [
        (MOE, 8, {"megatron": tensor(8)}, "tensor_model_parallel_size=8 is more than the model's 4 key-value heads"),
        (DENSE, 16, {"megatron": tensor(16)}, "megatron.tensor_model_parallel_size = 16: its groups reach over nodes"),
        (
            MOE,
            16,
            {"megatron": {"expert_model_parallel_size": 16}},
            "expert_model_parallel_size x expert_tensor_parallel_size = 16: its groups reach over nodes of 8 ranks",
        ),
        (
            MOE,
            8,
            {"megatron": {"pipeline_model_parallel_size": 8}, "training": {"minibatches_per_step": 128}},
            "with at most 16 microbatches on a rank the stages idle for 44% of the time",
        ),
        (
            MOE,
            8,
            {
                "megatron": {"pipeline_model_parallel_size": 8, "virtual_pipeline_model_parallel_size": 2},
                "training": {"minibatches_per_step": 512},
            },
            "4 samples of a minibatch are 4 for each of 1 data-parallel ranks, but an interleaved pipeline runs 8",
        ),
        (
            MOE,
            8,
            {"model": {"make_vocab_size_divisible_by": 16384}},
            "make_vocab_size_divisible_by=16384: with tensor_model_parallel_size=1 the vocabulary of 151936 gets",
        ),
        (
            DENSE,
            4,
            {"megatron": {"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 4}},
            "the stages get 32, 4 layers, and all wait for the largest",
        ),
        (
            MOE,
            8,
            {"rollout": {"max_new_tokens": 4000, "max_prompt_tokens": 1024}},
            "max_tokens_per_microbatch=4096 cannot hold the longest sample allowed",
        ),
        (
            MOE,
            8,
            {"placement": {"mode": "colocate", "servers_per_node": 1}, "sglang": {"tp_size": 4}},
            "4 of the 8 devices of a node idle while the others generate; use 2",
        ),
    ],
)
def test_what_would_be_slow(facts: Facts, ranks: int, sections: dict[str, Any], words: str) -> None:
    found = warnings(facts, ranks, **sections)
    assert any(words in warning for warning in found), found


@pytest.mark.parametrize(
    "facts, sections, words",
    [
        (
            MOE,
            {"sglang": {"tp_size": 3}},
            "sglang.tp_size=3: the model's 32 attention heads and 4 key-value",
        ),
        (MOE, {"sglang": {"tp_size": 4, "attn_dp_size": 3}}, "not a multiple of the 3 replicas of attention"),
        (MOE, {"sglang": {"tp_size": 4, "ep_size": 3}}, "sglang.ep_size=3 does not divide the model's 128 experts"),
        (
            MOE,
            {"sglang": {"tp_size": 4, "quantization": "fp8"}},
            "parts of 192, which are no multiple of a block",
        ),
        (MOE, {"rollout": {"max_new_tokens": 8192}}, "max_tokens_per_microbatch=4096 cannot hold a response of"),
        (MOE, {"sglang": {"context_length": 1024}}, "sglang.context_length=1024 leaves no room for a prompt"),
    ],
)
def test_what_the_servers_would_refuse(facts: Facts, sections: dict[str, Any], words: str) -> None:
    assert words in refusal(facts, **sections)


def test_servers_of_others_and_other_objectives_are_left_alone() -> None:
    wrong = {"tp_size": 3}
    assert warnings(MOE, sglang=wrong, rollout={"server": {"url": "http://a:1"}}) == []
    assert warnings(MOE, sglang=wrong, objective="sft") == []
    assert warnings(MOE, sglang={"tp_size": 4, "ep_size": 4, "quantization": "fp8"}) == []
    with pytest.raises(UserError, match=r"sglang.tp_size=3"):
        check_plan(make_config(sglang=wrong, objective="rollout", megatron=tensor(3)), MOE, 1, 1)


def test_sizes_of_the_groups() -> None:
    sizes = Parallelism.of(
        {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 8, "expert_model_parallel_size": 8}, 128, 8
    )
    assert (sizes.data, sizes.expert_data) == (4, 2)


def test_the_plan_is_checked_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, megatron_vespo.plan.check; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
