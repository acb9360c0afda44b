"""What can be found wrong before torch is imported or a process is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from megatron_vespo.config import Config, SourceSection
from megatron_vespo.data.prompts import read_prompts
from megatron_vespo.data.rows import is_hub_name
from megatron_vespo.data.sft import make_supervised
from megatron_vespo.data.sources import form_of, rows_of
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.dotted import check_object
from megatron_vespo.errors import UserError
from megatron_vespo.megatron_options import check_megatron_options, data_parallel_size
from megatron_vespo.metrics.conditions import choose_conditions, stop_after
from megatron_vespo.plan.check import check_plan
from megatron_vespo.plan.sizes import Facts
from megatron_vespo.rewards.loader import check_reward
from megatron_vespo.rewards.terms import terms_of
from megatron_vespo.rollout.batches import list_batches
from megatron_vespo.rollout.keys import server_key
from megatron_vespo.rollout.placement import Node, check_placement
from megatron_vespo.rollout.server_args import validate_server_args


def check_config(config: Config, world_size: int, node: Node | None = None) -> None:
    """Check files, sizes and names that a run needs.

    Args:
        config: Configuration.
        world_size: Trainer ranks.
        node: This one of the job's nodes; default: all ranks are on one.

    Raises:
        UserError: The first thing that is wrong, naming the field.
    """
    check_megatron_options(config.megatron, config.model.layer_spec)
    choose_conditions(config.health.warn)
    stop_after(config.health.stop_when)
    _check_ranks(config, world_size)
    if config.objective == "rollout" and config.run.resume != "never":
        raise UserError("run.resume: objective rollout saves no checkpoints to go on from; leave it out")
    if config.samples_from_server:
        check_servers(config, node or Node(ranks=world_size))
    _check_model(config)
    if config.objective == "rl" and config.samples_from_server:
        check_pushes(config)
    if config.rollout.replay is not None:
        _check_replay(config, Path(config.rollout.replay))
    else:
        _check_data(config)


def check_inputs(config: Config, *, only_evaluates: bool = False) -> None:
    """Look at what a run reads of its user's own, while nothing is lost yet; to be called after :func:`check_config`.

    Functions must be where they are said to be, and the first row of each data file must be one. What other rows, data
    sets and functions hold is seen when they are read.

    Args:
        config: Configuration.
        only_evaluates: Nothing is trained on: the training data is of no matter.

    Raises:
        UserError: The first thing that is wrong, naming the file.
    """
    if config.rollout.replay is not None:
        return
    tokenizer = load_tokenizer(config.model.hf_path)
    sources = [] if only_evaluates else [*config.data.train_sources.values()]
    if config.objective != "sft":
        sources += config.data.evaluation_sources.values()
        for term in terms_of(config.reward):
            check_reward(term.function)
        if config.rollout.generate is not None:
            check_object(config.rollout.generate, "rollout.generate")
    for source in sources:
        if source.function is not None:
            check_object(source.function, "data")
        elif source.path is not None and Path(source.path).is_file():
            first, form = islice(rows_of(source), 1), form_of(source, config.data)
            if config.objective == "sft":
                make_supervised(first, tokenizer, sys.maxsize, form)
            else:
                read_prompts(first, tokenizer, sys.maxsize, form)


def check_servers(config: Config, node: Node) -> None:
    """Check what the servers are started with, or asked by.

    Args:
        config: Configuration of a run that samples.
        node: This node.

    Raises:
        UserError: The first thing that is wrong, naming the field.
    """
    if config.rollout.server.python is None:
        validate_server_args(config.sglang)
    server_key(config.rollout.server)
    if config.rollout.server.is_own:
        check_placement(config, node)
    elif config.placement.servers_per_node > 1 and config.rollout.server.named_by != "url_file":  # serve's, then
        raise UserError(
            f"placement.servers_per_node: nothing is started where rollout.server.{config.rollout.server.named_by} says"
            " where the servers are; leave one of the two out"
        )


def check_parallel_plan(config: Config, world_size: int, ranks_per_node: int) -> list[str]:
    """Check that model, samples and servers fit the ranks; to be called after :func:`check_config`. It imports torch.

    Args:
        config: Configuration.
        world_size: Ranks of the job.
        ranks_per_node: Ranks on each node.

    Returns:
        Warnings.

    Raises:
        UserError: The architecture is not supported, or everything that is wrong with the plan, a line each.
    """
    from megatron_vespo.models.registry import load_architecture

    architecture = load_architecture(config.model.hf_path)
    facts = Facts(architecture.transformer_config(), architecture.vocab_size, architecture.context_length)
    return check_plan(config, facts, world_size, ranks_per_node)


def _check_ranks(config: Config, world_size: int) -> None:
    """Ranks enough and not too many."""
    if config.objective == "rollout":
        if world_size > 1:
            raise UserError(
                f"objective: rollout trains no model and runs on one rank, not on {world_size}; the server's own size"
                " is sglang.tp_size"
            )
        return
    replicas = data_parallel_size(config.megatron, world_size)
    if config.objective == "rl":
        minibatch = (
            config.rollout.prompts_per_step * config.rollout.samples_per_prompt // config.training.minibatches_per_step
        )
        sizes = "rollout.prompts_per_step * rollout.samples_per_prompt / training.minibatches_per_step"
    else:
        minibatch, sizes = config.training.samples_per_step, "training.samples_per_step"
    if minibatch < replicas:
        raise UserError(f"{sizes} = {minibatch} samples are fewer than the {replicas} data-parallel ranks")


def _check_replay(config: Config, folder: Path) -> None:
    """A batch for every step, where making the run folder does not delete them."""
    if folder.resolve().is_relative_to(config.run_folder.resolve()):
        raise UserError(
            f"rollout.replay: {folder} lies in this run's own folder, which starts empty; choose another run.name"
        )
    found, steps = len(list_batches(folder)), config.training.steps
    if found < steps:
        raise UserError(
            f"rollout.replay: {folder} holds {found} saved rollout batches (batch_000001.msgpack, ...), fewer than"
            f" training.steps={steps}"
        )


def _check_data(config: Config) -> None:
    for field, source in _data_sources(config).items():
        # A file is seen at once; what a folder, a name or a function holds is seen when it is read.
        if source.path is None or Path(source.path).is_dir() or is_hub_name(source.path):
            continue
        if not Path(source.path).is_file():
            raise UserError(f"{field}: {source.path} not found")
        if Path(source.path).stat().st_size == 0:
            raise UserError(f"{field}: {source.path} is empty; it needs one JSON object a line")


def _data_sources(config: Config) -> dict[str, SourceSection]:
    """All sources by where they stand in the configuration."""
    several = isinstance(config.data.train, dict)
    train = {f"data.train.{name}" if several else "data.train": s for name, s in config.data.train_sources.items()}
    return {**train, **{f"data.evaluation.{name}": s for name, s in config.data.evaluation_sources.items()}}


def _is_quantized(folder: Path) -> bool:
    try:
        return "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return False  # whoever reads the architecture says what is wrong


def _check_model(config: Config) -> None:
    folder = Path(config.model.hf_path)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.hf_path: {folder / 'config.json'} not found; give a Hugging Face checkpoint folder")
    if config.objective == "rl" and config.samples_from_server and _is_quantized(folder):
        raise UserError(
            f"model.hf_path: {folder} is quantized: SGLang would sample from quantized weights and be sent plain ones;"
            " convert it with tools/hf_to_megatron.py --dtype bf16 and tools/megatron_to_hf.py, and use the result;"
            " with sglang.quantization: fp8 the servers sample from FP8 all the same"
        )
    if config.model.initialize == "hf" and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model.hf_path: no *.safetensors in {folder}; give a checkpoint with weights, or set"
            " model.initialize=random"
        )


# What does not go with devices that trainer and servers share: whether it is so, and why.
_NOT_SHARED: tuple[tuple[Callable[[Config], bool], str], ...] = (
    (
        lambda config: config.rollout.max_staleness > 0,
        "rollout.max_staleness: servers that share the trainer's devices cannot generate while it trains; set it to 0,"
        " or placement.mode: disaggregated",
    ),
    (
        lambda config: not config.rollout.server.is_own,
        "rollout.server: servers that others started are on devices of their own; leave url, url_file and router out,"
        " or set placement.mode: disaggregated",
    ),
    (
        lambda config: config.transport in ("broadcast", "delta"),
        "weight_sync.transport: broadcast and delta go over a process group in which no GPU may be twice; leave it out"
        " (tensor), or use disk, or set placement.mode: disaggregated",
    ),
    (
        lambda config: config.weight_sync.pause != "retract",
        "weight_sync.pause: no request is in flight during a push where devices are shared; leave it out",
    ),
)


def check_pushes(config: Config) -> None:
    """Check how weights are to reach the servers against where the servers are and what they hold.

    Raises:
        UserError: The first thing that is wrong, naming the field.
    """
    if config.shares_devices:
        for applies, reason in _NOT_SHARED:
            if applies(config):
                raise UserError(f"placement.mode=colocate does not go with {reason}")
    elif config.transport == "tensor":
        raise UserError(
            "weight_sync.transport=tensor needs memory that trainer and servers share: set placement.mode: colocate, or"
            " use broadcast"
        )
    if not config.quantises_pushes:
        return
    if not config.rollout.server.is_own and config.weight_sync.verify == "none":
        raise UserError(
            "sglang.quantization=fp8: servers that others started must hold FP8 weights in blocks as they are pushed"
            " (start them with megatron_vespo.serve and this configuration), and nothing would say if they do not;"
            " leave weight_sync.verify: none out"
        )
    if config.transport in ("delta", "disk"):
        raise UserError(
            f"sglang.quantization=fp8: weights quantised on push travel by broadcast or tensor, not by"
            f" {config.transport}; leave weight_sync.transport out"
        )


def describe_layout(config: Config, world_size: int) -> str:
    """The parallel layout in words, for console and summary."""
    if config.objective == "rollout":
        return "1 rank, no trainer"
    sizes = {
        "TP": config.megatron.get("tensor_model_parallel_size", 1),
        "PP": config.megatron.get("pipeline_model_parallel_size", 1),
        "EP": config.megatron.get("expert_model_parallel_size", 1),
        "DP": data_parallel_size(config.megatron, world_size),
    }
    ranks = f"{world_size} rank" + ("s" if world_size > 1 else "")
    return f"{ranks}, " + " ".join(f"{name}{size}" for name, size in sizes.items())
