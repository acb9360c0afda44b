"""Evaluate one model: ``python -m megatron_vespo.evaluate RUN|CONFIG [--model HF | --checkpoint FOLDER] [--url URL]``.

Samples and scores the sets of ``data.evaluation`` as the configuration of a run says, without a trainer; with servers
of its own, or a running one with the weights that it has. RUN, a run's folder, stands for its configuration and the
model that it trained. docs/evaluation.md
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console

from megatron_vespo import connect
from megatron_vespo.checkpoint_folder import TRACKER, tracked
from megatron_vespo.checks import check_inputs, check_servers
from megatron_vespo.config import Config
from megatron_vespo.config_file import load_config
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.errors import UserError
from megatron_vespo.evaluation import Evaluator
from megatron_vespo.inputs import prepare_evaluation
from megatron_vespo.logs import RankLog
from megatron_vespo.metrics.evaluations import EvaluationSink, SetResult, console_table, read_results
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.rollout.own_servers import OwnServers, make_servers
from megatron_vespo.rollout.placement import Node, check_gpus, describe_servers, server_devices
from megatron_vespo.rollout.service import RolloutService
from megatron_vespo.run_folder import CONFIG_FILE
from megatron_vespo.stopping import StopRequest
from megatron_vespo.train import make_parser

# What a configuration of a training run says of training, and is of no matter here.
_NO_TRAINING = ("objective=rollout", "run.resume=never", "preflight.only=false", "rollout.replay=null")
_WEIGHTS_AS_LOADED = 0


def make_evaluate_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser("python -m megatron_vespo.evaluate", __doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--model", metavar="FOLDER", help="Hugging Face folder; default: hf/latest of RUN, model.hf_path of CONFIG"
    )
    source.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        help="one of our checkpoints (runs/NAME/checkpoints/iter_0000040), or the newest of such a folder; converted to"
        " a temporary Hugging Face folder",
    )
    parser.add_argument("--url", help="a running server, evaluated with the weights it has; default: own servers")
    parser.add_argument("--output", metavar="FOLDER", help="default: evaluation/ in the run's folder, if it is there")
    parser.add_argument("--label", help="name of the results; default: made from the model's or the checkpoint's")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate, write and print the table.

    Returns:
        Exit status: 0, or 1 after an error or where it was asked to stop.
    """
    options = make_evaluate_parser().parse_intermixed_args(arguments)
    stop = StopRequest()
    stop.install()
    try:
        _look_into_folders(options)
        with ExitStack() as stack:
            stack.callback(stop.uninstall)
            results = _evaluate(options, stack, stop)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return 1
    return 0 if results else 1


def _evaluate(options: argparse.Namespace, stack: ExitStack, stop: StopRequest) -> dict[str, SetResult]:
    config = _load(options)
    if not config.data.evaluation:
        raise UserError("data.evaluation: no set is named; there is nothing to evaluate")
    if options.checkpoint and options.url:
        raise UserError("--checkpoint: a running server has weights of its own; leave out --checkpoint or --url")
    architecture, tokenizer = load_architecture(config.model.hf_path), load_tokenizer(config.model.hf_path)
    check_inputs(config, only_evaluates=True)
    output = _output_folder(config, options.output)
    label = _label(options, config)
    if options.checkpoint is not None:
        config = _with_model(config, _convert(Path(options.checkpoint), Path(config.model.hf_path), output, stack))
    own = stack.enter_context(_servers(config, output))
    _say(f"evaluating {label}: {', '.join(config.data.evaluation)}; {describe_servers(config, Node(ranks=0))}")
    inputs = prepare_evaluation(config, architecture, tokenizer, stack, _say)
    own.wait_ready()
    connection = connect.connect(
        config,
        architecture,
        tokenizer,
        inputs,
        own,
        stack,
        announce=_say,
        stop_requested=lambda: stop.requested,
        unpushed_version=_WEIGHTS_AS_LOADED,
        only_evaluates=True,
    )
    service = RolloutService(connection.engine, _one_rank, _no_push)
    stack.callback(service.close)
    service.start()
    stop.defer()
    sink = EvaluationSink(output, lambda ids: tokenizer.decode(ids.tolist()), config.evaluation.keep_answers)
    made = connect.make_evaluator(config, service, connection)
    _say(f"sampling {sum(len(part.prompts) * part.samples_per_prompt for part in made.sets):,} responses")
    evaluator = Evaluator(service, made.sets, made.interval, made.scoring, sink)
    infos = [member.info for member in connection.fleet.members if member.info is not None]
    results = evaluator.evaluate(
        label,
        {
            "model": options.checkpoint or config.model.hf_path,
            "servers": [member.url for member in connection.fleet.members] if options.url else "own",
            "weight_versions": sorted({info.weight_version for info in infos}),
        },
    )
    if results:
        (record,) = [record for record in read_results(output) if record["label"] == label]
        Console().print(console_table(record))
        _say(f"results: {output / f'{label}.json'}; all evaluations: {output / 'results.md'}")
    return results


def _look_into_folders(options: argparse.Namespace) -> None:
    """Put a run's folder's configuration and model, and the newest of a folder of checkpoints, in their places."""
    run = Path(options.config)
    if run.is_dir():
        options.config = str(run / CONFIG_FILE)
        options.output = options.output or str(run / "evaluation")
        if options.model is None and options.checkpoint is None and options.url is None:
            options.overrides.insert(0, f"model.hf_path={json.dumps(str(run / 'hf' / 'latest'))}")
    if options.checkpoint is not None and (Path(options.checkpoint) / TRACKER).is_file():
        options.checkpoint = str(tracked(Path(options.checkpoint)))


def _load(options: argparse.Namespace) -> Config:
    more = list(_NO_TRAINING)
    if options.model is not None:
        more.append(f"model.hf_path={json.dumps(options.model)}")
    if options.url is not None:
        more += [f"rollout.server.url={json.dumps(options.url)}", "rollout.server.url_file=null"]
        more.append("rollout.server.router=null")
    return load_config(options.config, [*options.overrides, *more])


def _with_model(config: Config, folder: Path) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"hf_path": str(folder)})})


def _output_folder(config: Config, asked: str | None) -> Path:
    """In the run's folder where there is a run; beside it otherwise, as a run starts in an empty folder only."""
    run = config.run_folder
    beside = run.with_name(f"{run.name}.evaluation")
    folder = Path(asked) if asked is not None else run / "evaluation" if (run / CONFIG_FILE).is_file() else beside
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}") from error
    return folder


def _label(options: argparse.Namespace, config: Config) -> str:
    """A name that no evaluation of a training run has."""
    if options.label is not None:
        label = options.label
    elif options.checkpoint is not None:
        label = f"checkpoint_{Path(options.checkpoint).resolve().name}"
    elif options.url is not None and options.model is None:
        label = "server"
    else:
        label = f"model_{Path(config.model.hf_path).resolve().name}"
    return re.sub(r"[^\w.-]", "_", label)


def _servers(config: Config, output: Path) -> OwnServers:
    node = Node(ranks=0)
    check_servers(config, node)
    if not config.rollout.server.is_own:
        return OwnServers()
    check_gpus(config, node)
    devices = server_devices(config, node.ranks)
    logs = [output / f"sglang_{k}.log" for k in range(len(devices))]
    return OwnServers(make_servers(config, devices, logs, config.run.seed, None))


def _convert(checkpoint: Path, companions: Path, output: Path, stack: ExitStack) -> Path:
    """A temporary Hugging Face folder of a checkpoint's weights, beside the results: temporary folders may be small."""
    if not checkpoint.is_dir():
        raise UserError(f"--checkpoint: {checkpoint} is no folder")
    _say(f"converting {checkpoint}")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".converted-", dir=output))) / "hf"
    # In a process of its own: Megatron is not needed again, and must not see the servers' devices.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_convert_here, checkpoint, folder, companions, output / "conversion.log").result()
    return folder


def _convert_here(checkpoint: Path, folder: Path, companions: Path, log_file: Path) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    log = RankLog()
    log.write_to(log_file)
    import torch  # noqa: F401 - its logger exists from here on

    log.adopt("torch")
    from megatron_vespo import parallel
    from megatron_vespo.models.convert import torch_dist_to_hf

    parallel.initialize_alone()
    torch_dist_to_hf(checkpoint, folder, companions)


def _one_rank(payload: bytes | None) -> bytes:
    """The broadcast among one rank."""
    assert payload is not None
    return payload


def _no_push() -> None:
    """A server that was started again has the weights it loaded, and they are the ones."""


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
