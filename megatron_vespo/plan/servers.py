"""How a model fits the SGLang servers of the run, and these the devices of a node."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vespo.config import Config
from megatron_vespo.plan.sizes import Facts, Problem
from megatron_vespo.rollout.placement import devices_per_server, server_size

# Rows and columns of a block of an FP8 weight: those of the published checkpoints.
_FP8_BLOCK = 128


def find_server_problems(config: Config, facts: Facts, ranks_per_node: int) -> Iterator[Problem]:
    """What would be wrong with the servers that the run starts."""
    yield from _server(config, facts)
    yield from _devices(config, ranks_per_node)


def _server(config: Config, facts: Facts) -> Iterator[Problem]:
    """What SGLang asserts when it builds the model (models/qwen3_moe.py:503, layers/quantization/fp8.py:1584)."""
    sglang = config.sglang
    tensor, expert = server_size(sglang, "tp_size"), server_size(sglang, "ep_size")
    attention_replicas = int(sglang.get("attn_dp_size") or 1)
    if sglang.get("enable_dp_attention"):
        attention_replicas = server_size(sglang, "dp_size")
    heads, groups = facts.transformer["num_attention_heads"], facts.query_groups
    if tensor % attention_replicas:
        yield Problem(
            f"sglang.tp_size={tensor} is not a multiple of the {attention_replicas} replicas of attention in it"
        )
        return
    ranks = tensor // attention_replicas
    if heads % ranks or (groups % ranks and ranks % groups):
        fit = [n for n in range(1, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
        yield Problem(
            f"sglang.tp_size={tensor}: the model's {heads} attention heads and {groups} key-value heads cannot be split"
            f" over {ranks} ranks; use one of {', '.join(map(str, fit))}"
        )
    if not facts.experts:
        return
    if facts.experts % expert:
        yield Problem(f"sglang.ep_size={expert} does not divide the model's {facts.experts} experts")
        return
    width, parts = facts.transformer["moe_ffn_hidden_size"], tensor // expert
    if width % parts:
        yield Problem(
            f"sglang.tp_size={tensor} / ep_size={expert} = {parts} does not divide the width {width} of an expert"
        )
    elif sglang.get("quantization") == "fp8" and width // parts % _FP8_BLOCK:
        yield Problem(
            f"sglang.quantization=fp8: {parts} ranks split an expert of width {width} into parts of {width // parts},"
            f" which are no multiple of a block of {_FP8_BLOCK}; use sglang.ep_size={tensor}"
        )


def _devices(config: Config, ranks_per_node: int) -> Iterator[Problem]:
    each, number = devices_per_server(config.sglang), config.placement.servers_per_node
    idle = ranks_per_node - each * number
    if config.placement.mode == "colocate" and idle > 0:
        yield Problem(
            f"placement.servers_per_node={number} with {each} devices a server: {idle} of the {ranks_per_node} devices"
            f" of a node idle while the others generate; use {ranks_per_node // each}",
            fatal=False,
        )
