from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measure import peak_bytes
from megatron_vespo import parallel
from megatron_vespo.config_file import parse_config
from megatron_vespo.errors import UserError
from megatron_vespo.estimate import activations
from megatron_vespo.estimate.activations import Recompute, head_memory, in_flight, layer_memory, stage_activations
from megatron_vespo.estimate.assumptions import Assumptions
from megatron_vespo.estimate.cluster import make_cluster
from megatron_vespo.estimate.devices import DEVICES
from megatron_vespo.estimate.estimate import Estimate, estimate, facts_of
from megatron_vespo.estimate.parameters import count_active, count_model, layers_of_stages
from megatron_vespo.estimate.report import describe_estimate
from megatron_vespo.estimate.trainer import StateBytes
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.plan.sizes import Parallelism
from megatron_vespo.policy import logprobs
from megatron_vespo.policy.tiles import SIZES, TileSize
from tools.estimate import main

ROOT = Path(__file__).parents[3]
ARCHITECTURES = ROOT / "tests" / "fixtures" / "architectures"


@pytest.mark.parametrize(
    "name, total, active",
    [("qwen3_30b_a3b", 30.5, 3.3), ("qwen3_235b_a22b", 235, 22), ("qwen3_8b", 8.2, 8.2)],
)
def test_parameters_are_as_published(name: str, total: float, active: float) -> None:
    architecture = load_architecture(ARCHITECTURES / name)
    facts = facts_of(architecture)
    assert count_model(facts, architecture.tied_embeddings).total / 1e9 == pytest.approx(total, rel=0.005)
    assert count_active(facts, architecture.tied_embeddings) / 1e9 == pytest.approx(active, rel=0.02)


def test_layers_of_an_interleaved_pipeline() -> None:
    assert layers_of_stages([[1, 2], [2, 1]]) == [[0, 3, 4], [1, 2, 5]]


@pytest.mark.parametrize(
    "megatron, expected",
    [
        ({}, StateBytes(4, 4, 0, 8, 0, False)),
        ({"bf16": True, "use_distributed_optimizer": True}, StateBytes(2, 4, 4, 8, 0, True)),
        ({"bf16": True, "grad_reduce_in_fp32": False, "fp8": "e4m3"}, StateBytes(2, 2, 4, 8, 2, False)),
        (
            {
                "bf16": True,
                "use_precision_aware_optimizer": True,
                "exp_avg_dtype": "bfloat16",
                "exp_avg_sq_dtype": "bfloat16",
            },
            StateBytes(2, 4, 2, 4, 0, False),
        ),
        (
            {"bf16": True, "use_precision_aware_optimizer": True, "store_param_remainders": False},
            StateBytes(2, 4, 4, 8, 0, False),
        ),
    ],
)
def test_bytes_of_a_parameter(megatron: dict[str, Any], expected: StateBytes) -> None:
    assert StateBytes.of(megatron) == expected


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(UserError, match=r"megatron.exp_avg_dtype: unknown dtype 'bf61'"):
        StateBytes.of({"use_precision_aware_optimizer": True, "exp_avg_dtype": "bf61"})


def sizes(pipeline: int, virtual: int = 1) -> Parallelism:
    return Parallelism(pipeline, 8, 1, pipeline, virtual, 1, 1)


def test_microbatches_in_flight() -> None:
    assert [in_flight(sizes(4), stage) for stage in range(4)] == [4, 3, 2, 1]
    # 2 * 3 + 1 * 4 warm-up passes of half a stage on the first stage, one more under way
    assert [in_flight(sizes(4, 2), stage) for stage in (0, 3)] == [5.5, 2.5]


def test_recomputation_of_some_layers() -> None:
    facts = facts_of(load_architecture(ARCHITECTURES / "qwen3_8b"))
    memory = layer_memory(facts, sizes(1), {}, False, 2, 1.0)
    assert memory.input == 2 * 4096
    layers, tokens = [memory] * 8, 10

    def kept(**megatron: Any) -> float:
        return stage_activations(layers, tokens, 1, Recompute.of(megatron), 2)[0] / tokens

    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
    assert kept() == 8 * memory.kept
    assert kept(**full) == 4 * memory.input  # the input of every second layer
    assert kept(**full | {"recompute_method": "block", "recompute_num_layers": 3}) == 6 * memory.input + 2 * memory.kept


def test_the_head_takes_what_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {device: TileSize(tile.elements, tile.least_width) for device, tile in activations.TILES.items()}
    assert sizes == SIZES
    rows, hidden, vocabulary = 1024, 256, 20_000
    weight = torch.randn(vocabulary, hidden, dtype=torch.bfloat16).requires_grad_()
    states = torch.randn(rows, hidden, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))

    def work() -> None:
        head = logprobs.token_log_probs(states, weight, targets, trained=rows, vocab_size=vocabulary, temperature=1.0)
        head.log_pi.sum().backward()

    monkeypatch.setattr(parallel, "tensor_parallel_size", lambda: 1)
    monkeypatch.setattr(parallel, "tensor_parallel_rank", lambda: 0)
    assert peak_bytes(work) == pytest.approx(head_memory(rows, hidden, vocabulary, 2, "cpu"), rel=0.1)


def make_tree() -> dict[str, Any]:
    return {
        "run": {"name": "r"},
        "model": {"hf_path": "m"},
        "data": {"train": "d"},
        "megatron": {"bf16": True, "expert_model_parallel_size": 8, "use_distributed_optimizer": True},
        "sglang": {"tp_size": 4},
        "placement": {"mode": "colocate", "servers_per_node": 2},
        "rollout": {"prompts_per_step": 256, "samples_per_prompt": 8, "max_new_tokens": 8192, "concurrency": 4096},
        "training": {"steps": 1, "minibatches_per_step": 8, "max_tokens_per_microbatch": 16384},
    }


def make(nodes: int = 2, gpu: str = "h100", assume: Assumptions | None = None, **sections: Any) -> Estimate:
    tree = make_tree()
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    architecture = load_architecture(ARCHITECTURES / "qwen3_30b_a3b")
    return estimate(parse_config(tree), architecture, DEVICES[gpu], nodes=nodes, assumptions=assume)


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def test_states_of_30b_by_hand() -> None:
    memory = make().trainer
    experts, dense = 48 * 128 * 3 * 2048 * 768 / 8, 30.532e9 - 48 * 128 * 3 * 2048 * 768
    assert memory.parameters.experts == experts
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(
        experts * (2 + 4 + 12 / 2) + dense * (2 + 4 + 12 / 16), rel=0.001
    )


def test_what_does_not_fit_says_what_to_change() -> None:
    (activation_problem,) = make().problems
    assert "; set megatron.recompute_granularity: full" in activation_problem
    assert make(megatron=FULL).problems == []
    (long_rows,) = make(megatron=FULL, training={"max_tokens_per_microbatch": 400_000}).problems
    assert "activations take most; lower training.max_tokens_per_microbatch" in long_rows
    (state_problem,) = make(nodes=1, megatron=FULL).problems
    assert "raise megatron.expert_model_parallel_size" in state_problem and "of 79.6 GiB" in state_problem
    assert make(nodes=1, gpu="h200", megatron=FULL).problems == []
    server = make(
        megatron=FULL,
        sglang={"tp_size": 1, "mem_fraction_static": 0.75},
        placement={"servers_per_node": 8},
        rollout={"max_new_tokens": 16000},
    )
    assert any("raise sglang.tp_size or sglang.mem_fraction_static" in problem for problem in server.problems)


def test_levers_move_memory_the_right_way() -> None:
    base = make(megatron=FULL).trainer
    assert make(nodes=4, megatron=FULL).trainer.optimizer < base.optimizer
    assert make(megatron={**FULL, "grad_reduce_in_fp32": False}).trainer.gradients == base.gradients / 2
    offload = make(megatron={**FULL, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}).trainer
    assert offload.optimizer == 0 and offload.host_optimizer == base.optimizer
    fp8 = make(megatron={**FULL, "fp8": "e4m3"}).trainer
    assert fp8.quantised == 2 * fp8.parameters.experts


def test_servers_in_fp8_take_less_than_three_fifths() -> None:
    plain, fp8 = make(megatron=FULL).server, make(megatron=FULL, sglang={"quantization": "fp8", "ep_size": 4}).server
    assert plain is not None and fp8 is not None
    assert 0.5 < fp8.weights / plain.weights < 0.6 and fp8.tokens > plain.tokens
    assert plain.token == 48 * 2 * 128 * 2  # layers, key and value of one head, bfloat16


def test_more_ranks_than_key_value_heads_hold_copies() -> None:
    server = make(megatron=FULL, sglang={"tp_size": 8}, placement={"servers_per_node": 1}).server
    assert server is not None and server.token == 48 * 2 * 128 * 2


def test_times_answer_to_the_assumptions() -> None:
    base = make(megatron=FULL).durations
    faster = make(megatron=FULL, assume=replace(Assumptions(), mfu=0.5, decode_bandwidth=0.9)).durations
    assert base is not None and faster is not None
    assert faster.train == pytest.approx(base.train / 2)
    assert faster.generate < base.generate
    assert base.step == pytest.approx(base.generate + base.train + base.sync + base.swap)
    # 4 forward passes executed for 3 that count
    assert base.mfu == pytest.approx(0.25 * 0.95 * 3 / 4)


def test_asynchronous_steps_overlap() -> None:
    placement = {"mode": "disaggregated", "servers_per_node": 1}
    megatron = {**FULL, "expert_model_parallel_size": 4}
    times = make(megatron=megatron, placement=placement, rollout={"max_staleness": 1}).durations
    assert times is not None and times.swap == 0
    assert times.step == max(times.generate, times.train + times.sync)


def test_gpus_are_dealt() -> None:
    tree = make_tree()
    shared = make_cluster(parse_config(tree), 2, 8, 0)
    assert (shared.ranks, shared.servers, shared.gpus) == (16, 4, 16)
    tree["placement"]["servers_per_node"] = 4
    with pytest.raises(UserError, match=r"need 16 of a node's 8 GPUs; use 2"):
        make_cluster(parse_config(tree), 2, 8, 0)
    tree["placement"] = {"servers_per_node": 1}
    apart = make_cluster(parse_config(tree), 2, 8, 0)
    assert (apart.ranks, apart.servers, apart.gpus) == (8, 2, 16)
    tree["rollout"]["server"] = {"url_file": "servers.txt"}
    others = make_cluster(parse_config(tree), 3, 8, 1)
    assert (others.ranks, others.servers, others.gpus) == (16, 2, 24)
    with pytest.raises(UserError, match="leave no node to train on"):
        make_cluster(parse_config(tree), 1, 8, 1)
    tree["rollout"]["server"] = {}
    tree["placement"] = {"servers_per_node": 2}
    with pytest.raises(UserError, match=r"leave none of a node's 8 GPUs to train on"):
        make_cluster(parse_config(tree), 1, 8, 0)


def test_every_assumption_is_printed_and_explained() -> None:
    text = describe_estimate(parse_config(make_tree()), make())
    for name in Assumptions.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in text
    assert text.splitlines()[-1].startswith("does not fit: a trainer GPU needs")


def test_the_tool_says_where_the_architecture_may_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "examples" / "qwen3_8b" / "async.yaml")
    assert main([config, "model.hf_path=/nowhere"]) == 1
    missing = capsys.readouterr().err
    assert missing.startswith(
        "error: /nowhere/config.json not found; name the model's folder with model.hf_path=..., or"
    )
    given = [config, "--architecture", str(ARCHITECTURES / "qwen3_8b" / "config.json")]
    assert main([*given, "--mfu", "0.3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "fits"
    assert main([*given, "sglang.mem_fraction_static=0.2"]) == 2
    assert "does not fit: a server GPU" in capsys.readouterr().out


def test_the_tool_answers_without_importing_megatron() -> None:
    code = "import sys, tools.estimate as t; t.main(sys.argv[1:]); assert 'megatron.core' not in sys.modules"
    given = ["examples/qwen3_8b/async.yaml", "--architecture", str(ARCHITECTURES / "qwen3_8b")]
    subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, check=True, capture_output=True)
