"""Estimate a run before any GPU is taken: parameters, memory, FLOPs, the time of a step, and whether it fits.

python tools/estimate.py CONFIG [section.key=value ...] --nodes N --gpus-per-node 8 --gpu h100
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megatron_vespo.config import Config
from megatron_vespo.config_file import load_config
from megatron_vespo.errors import UserError
from megatron_vespo.estimate.assumptions import Assumptions
from megatron_vespo.estimate.devices import DEVICES


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override of the file")
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the job, those that only serve included")
    parser.add_argument("--server-nodes", type=int, default=0, help="of these, nodes that serve and do not train")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu", choices=sorted(DEVICES), default="h100")
    parser.add_argument("--architecture", type=Path, help="config.json, or its folder, in place of model.hf_path's")
    assumed = parser.add_argument_group("assumptions")
    for item in fields(Assumptions):
        option = f"--{item.name.replace('_', '-')}"
        meaning = item.metadata["meaning"].replace("%", "%%")
        assumed.add_argument(option, type=float, default=item.default, help=f"{meaning}; {item.default:g}")
    return parser


def architecture_folder(config: Config, chosen: Path | None) -> Path:
    """The folder with the architecture's config.json.

    Raises:
        UserError: It is not there.
    """
    folder = Path(config.model.hf_path) if chosen is None else chosen
    folder = folder.parent if folder.name == "config.json" else folder
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder / 'config.json'} not found; name the model's folder with model.hf_path=..., or a config.json"
            " alone with --architecture"
        )
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the estimate; the exit status: 0 where the run fits, 2 where not, 1 where the configuration is wrong."""
    parser = make_parser()
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        folder = architecture_folder(config, options.architecture)
        # They import torch.
        from megatron_vespo.estimate.estimate import estimate
        from megatron_vespo.estimate.report import describe_estimate
        from megatron_vespo.models.registry import load_architecture

        result = estimate(
            config,
            load_architecture(folder),
            DEVICES[options.gpu],
            nodes=options.nodes,
            gpus_per_node=options.gpus_per_node,
            server_nodes=options.server_nodes,
            assumptions=Assumptions(**{item.name: getattr(options, item.name) for item in fields(Assumptions)}),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(describe_estimate(config, result))
    return 2 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
