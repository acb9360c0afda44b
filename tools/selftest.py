"""Check that an installation is whole: imports, versions, a configuration. Needs no GPU; an image's build ends with it.

    python tools/selftest.py [--server-python /opt/sglang/bin/python] [--transformer-engine]

Exit status 1 if something is missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What SGLang's workers import of this package, and what the server is started by.
_SERVER_IMPORTS = "import sglang, torch; from megatron_vespo.sglang_weights import loader; print(sglang.__version__, torch.__version__)"  # noqa: E501


class NotChecked(Exception):
    """It can be seen on a machine with a GPU only."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--server-python", default=sys.executable, help="interpreter that has SGLang; default: this one"
    )
    parser.add_argument(
        "--image-constraints", type=Path, help="versions that must not have changed (tools/pin_image.py)"
    )
    parser.add_argument("--transformer-engine", action="store_true", help="it must be there")
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "digits_cpu" / "rl.yaml")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and print a line for each; the exit status."""
    options = make_parser().parse_args(arguments)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    checks: dict[str, Callable[[], str]] = {
        "versions of the image": partial(kept, options.image_constraints),
        "torch": torch_works,
        "Transformer Engine": partial(optional, "transformer_engine.pytorch", needed=options.transformer_engine),
        "apex": partial(optional, "apex", needed=False),
        "Megatron-Core": megatron,
        "trainer": trainer,
        "SGLang": partial(server, options.server_python),
        "configuration": partial(configuration, options.config, options.server_python),
    }
    failed = False
    for name, check in checks.items():
        try:
            result = check()
        except NotChecked as reason:
            result = f"not checked: {reason}"
        except Exception as error:  # noqa: BLE001 - all are told of, and the others are still checked
            failed = True
            result = f"FAILED: {type(error).__name__}: {error}"
            traceback.print_exc()
        print(f"{name:22}{result}", flush=True)
    return 1 if failed else 0


def kept(constraints: Path | None) -> str:
    """That what was built for the image's CUDA has the version it had."""
    if constraints is None:
        raise NotChecked("no --image-constraints")
    pins = [line.split("===") for line in constraints.read_text(encoding="utf-8").splitlines() if "===" in line]
    changed = [f"{name} {_version(name)}, was {v}" for name, v in pins if _version(name) != v]
    if changed:
        raise RuntimeError("; ".join(changed))
    return f"{len(pins)} packages as they were"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_works() -> str:
    """That torch computes; a library of another torch on LD_LIBRARY_PATH would show."""
    import torch

    if torch.ones(2, 2).matmul(torch.ones(2, 2)).sum().item() != 8:
        raise RuntimeError("a matrix product is wrong")
    return f"{torch.__version__}, CUDA {torch.version.cuda}"


def optional(module: str, *, needed: bool) -> str:
    """A package that may be missing unless it is needed, or unless it is there but broken."""
    name = module.split(".")[0]
    if importlib.util.find_spec(name) is None and not needed:
        return "not there"
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as error:
        if "libcuda" in str(error):
            raise NotChecked(f"{error}, which comes with the driver") from error
        raise
    return _version(name) or "there"


def megatron() -> str:
    """That Megatron-Core imports in the adapted way of this package, in the pinned version."""
    from megatron_vespo import platform

    platform.prepare()
    from megatron.core.package_info import __shortversion__ as version

    from megatron_vespo.environment.checks import MEGATRON

    importlib.import_module("megatron.core")
    if version != MEGATRON:
        raise RuntimeError(f"{version}, not {MEGATRON}")
    return version


def trainer() -> str:
    """That all of the trainer imports."""
    importlib.import_module("megatron_vespo.training")
    return "imports"


def server(python: str) -> str:
    """That SGLang and our part of it import under the servers' interpreter, away from this folder."""
    command = [python, "-c", _SERVER_IMPORTS]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if result.returncode:
        raise RuntimeError(f"{python}: {result.stderr.strip()[-2000:]}")
    return "{} with torch {}".format(*result.stdout.split()[-2:])


def configuration(path: Path, python: str) -> str:
    """That an example is read, and that this machine's environment suits it."""
    from megatron_vespo.config_file import load_config
    from megatron_vespo.environment.checks import examine
    from megatron_vespo.environment.facts import read_facts
    from megatron_vespo.rollout.placement import Node

    config = load_config(path, [f"rollout.server.python={python}"])
    errors = [f.message for f in examine(read_facts(config, Node()), config) if f.severity == "error"]
    if errors:
        raise RuntimeError("; ".join(errors))
    return f"{path.name} is read"


if __name__ == "__main__":
    sys.exit(main())
