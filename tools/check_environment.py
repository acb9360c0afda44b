"""Check this machine for a run: versions, GPUs, network, shared memory, limits, disk. docs/environment.md explains.

    python tools/check_environment.py CONFIG --ranks 8
    torchrun --nnodes 2 --nproc-per-node 8 ... tools/check_environment.py CONFIG

Under torchrun every node is checked, and ranks and clocks are compared too. Exit status 1 where a run would be refused.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

from megatron_vespo.config import Config
from megatron_vespo.config_file import load_config
from megatron_vespo.environment.checks import CHECKS, examine
from megatron_vespo.environment.facts import Facts, read_facts
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.placement import Node


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of the file")
    parser.add_argument("--ranks", type=int, help="trainer ranks on this node; default: those of torchrun, or 1")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found.

    Returns:
        Exit status: 1 where a run would be refused.
    """
    options = make_parser().parse_intermixed_args(arguments)
    warnings.filterwarnings("ignore")  # upstream's, which a run has in its logs
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    try:
        config = load_config(options.config, options.overrides)
        node = Node.from_environment()
        facts = read_facts(config, replace(node, ranks=options.ranks) if options.ranks else node)
        wrong = False
        if os.environ["LOCAL_RANK"] == "0":
            text, wrong = report(facts, config)
            print(text, flush=True)
        # Even where this node is wrong: the others wait for it.
        if int(os.environ["WORLD_SIZE"]) > 1:
            compare_ranks(config)
    except UserError as error:
        if os.environ["RANK"] == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return 1 if wrong else 0


def report(facts: Facts, config: Config) -> tuple[str, bool]:
    """A table of all checks of this node, and whether there are errors."""
    gpus = facts.gpus
    cuda = f", driver {gpus.driver}, CUDA {'.'.join(map(str, gpus.cuda))}" if gpus.cuda else ""
    lines = [f"node {facts.node} of {facts.nodes}: {facts.ranks} ranks, {gpus.count} GPUs{cuda}"]
    lines += [f"  {name} {version}" for name, version in facts.versions.items()]
    if facts.server is not None:
        lines.append(f"  servers: {facts.server.python}, SGLang {facts.server.sglang or 'missing'}")
    found = {finding.check: finding for finding in examine(facts, config)}
    for check in CHECKS:
        finding = found.get(check.name)
        lines.append(f"{check.name:24}{'ok' if finding is None else f'{finding.severity}: {finding.message}'}")
    return "\n".join(lines), any(finding.severity == "error" for finding in found.values())


def compare_ranks(config: Config) -> None:
    """Let the ranks meet, as a run does, and compare them. Raises a UserError where they differ."""
    from megatron_vespo.environment.cuda import check_torch

    check_torch()
    from megatron_vespo import parallel
    from megatron_vespo.environment.ranks import check_ranks

    parallel.initialize({}, seed=1, timeout_minutes=5)
    try:
        check_ranks(config, [])
    finally:
        parallel.shutdown()
    if os.environ["RANK"] == "0":
        print(f"{os.environ['WORLD_SIZE']} ranks have met and agree", flush=True)


if __name__ == "__main__":
    sys.exit(main())
