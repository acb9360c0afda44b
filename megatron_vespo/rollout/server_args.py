"""The command line and the environment of an SGLang server, and the check of its arguments' names.

SGLang is never imported here: it may live in another environment, and its import takes longer than all of ours.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vespo.errors import UserError
from megatron_vespo.rollout import serve_with_key
from megatron_vespo.sglang_cpu.models import FAST_ARCHITECTURES
from megatron_vespo.sglang_cpu.platform import PLATFORM_NAME
from megatron_vespo.sglang_weights import LOADER
from megatron_vespo.upstream import nearest_name

DEVICES = ("cpu", "cuda")

# Arguments that are not the user's to set under ``sglang``: {name: why}.
RESERVED_ARGS = {
    "model_path": "the server starts from the run's own model",
    "model": "the server starts from the run's own model",
    "device": "it follows the run's device",
    "host": "it is a setting of the server",
    "port": "it is a setting of the server",
    "random_seed": "it follows the run's seed",
    "weight_version": "weight pushes set it",
    "api_key": "a server that other machines reach gets one; rollout.server.api_key_env names one of yours",
    "admin_api_key": "the same key is for all routes; rollout.server.api_key_env names one of yours",
    "config": "all arguments are written in the run's own configuration",
    "base_gpu_id": "placement chooses the devices",
    "gpu_id_step": "placement chooses the devices",
    **dict.fromkeys(
        ("nnodes", "node_rank", "dist_init_addr", "nccl_init_addr"),
        "a server that is started here has one node; start larger ones yourself and name them in rollout.server.url",
    ),
}

# What every server gets unless ``args`` says otherwise: {name: value}.
SERVER_DEFAULTS: dict[str, Any] = {
    # A line a request would flood the log.
    "log_level_http": "warning",
    # Weight pushes are verified, and changes applied, by code of ours inside the server; SGLang runs it only if told of
    # it at the start. Imported when it is first used.
    "custom_weight_loader": LOADER,
}

# More of it for a CPU server.
CPU_DEFAULTS: dict[str, Any] = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "cuda_graph_backend_decode": "disabled",
    "cuda_graph_backend_prefill": "disabled",
    # "auto" would turn a float32 checkpoint into float16, which CPUs compute slowly and inexactly.
    "dtype": "float32",
    # "auto" takes most of the memory for the KV cache.
    "max_total_tokens": 65536,
    # The warm-up compiles kernels; there are none on CPU.
    "skip_server_warmup": True,
    # An idle scheduler would otherwise poll without pause, on a core that the trainer needs.
    "sleep_on_idle": True,
}

# The environment of every server: {name: value}, None removes the variable.
SERVER_ENVIRONMENT: dict[str, str | None] = {
    # Without bytecode the imports take three times as long.
    "PYTHONDONTWRITEBYTECODE": None,
    "PYTHONUNBUFFERED": "1",
    # Warnings about absent kernels would crowd the cause out of the log's last lines.
    "PYTHONWARNINGS": "ignore",
    # A crash must reach the clients at once, not after a dump that takes up to a minute.
    "SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0",
    "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0",
    # Connections idle while the trainer trains must not be dropped under a request that is on its way.
    "SGLANG_TIMEOUT_KEEP_ALIVE": "3600",
    # torchrun's, which SGLang's own process groups would read.
    **dict.fromkeys(
        (
            *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
            *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
            *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
            *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE"),
        )
    ),
}

# More of it for a CPU server. One thread: tiny models lose time to more, and the trainer needs the other cores.
CPU_ENVIRONMENT: dict[str, str | None] = {"SGLANG_PLATFORM": PLATFORM_NAME, "OMP_NUM_THREADS": "1"}


def build_command(
    python: str,
    model_path: Path,
    device: str,
    host: str,
    port: int,
    random_seed: int,
    args: Mapping[str, Any],
    keyed: bool = False,
) -> list[str]:
    """The server's command line; ``keyed``: with an API key, which comes by ``KEY_VARIABLE`` of its environment.

    ``args`` are SGLang's own, in snake_case: True is a bare flag, False and None leave it out, a list becomes several
    values, a dict JSON.

    Raises:
        UserError: ``args`` holds a reserved name.
    """
    _refuse_reserved(args)
    defaults = SERVER_DEFAULTS | (CPU_DEFAULTS if device == "cpu" else {})
    own = {"model_path": model_path, "device": device, "host": host, "port": port, "random_seed": random_seed}
    command = [python, "-m", serve_with_key.__name__ if keyed else "sglang.launch_server"]
    for name, value in {**own, **defaults, **args}.items():
        if value is None or value is False:
            continue
        command.append("--" + name.replace("_", "-"))
        if value is not True:
            values = value if isinstance(value, (list, tuple)) else [value]
            command += [json.dumps(item) if isinstance(item, dict) else str(item) for item in values]
    return command


def build_environment(model_path: Path, device: str, overrides: Mapping[str, str]) -> dict[str, str]:
    """The server's environment: ours, changed by the tables above, then by ``overrides``."""
    changes = dict(SERVER_ENVIRONMENT)
    if device == "cpu":
        changes |= CPU_ENVIRONMENT
        if _architecture(model_path) in FAST_ARCHITECTURES:
            changes["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "megatron_vespo.sglang_cpu.models"
    environment = {name: value for name, value in os.environ.items() if name not in changes}
    environment |= {name: value for name, value in changes.items() if value is not None}
    return environment | dict(overrides)


def validate_server_args(args: Mapping[str, Any]) -> None:
    """Check the names in ``args`` against SGLang's, where SGLang is installed in this environment.

    Raises:
        UserError: an unknown name, with the nearest known one, or a name that is not the user's to set.
    """
    _refuse_reserved(args)
    known = known_server_args()
    if known is None:
        return
    for name in args:
        if name not in known:
            near = nearest_name(name, known)
            hint = f"did you mean sglang.{near}?" if near else "see `python -m sglang.launch_server --help`"
            raise UserError(f"sglang.{name}: SGLang has no such server argument; {hint}")


def known_server_args() -> set[str] | None:
    """Names of all server arguments and their aliases, read from SGLang's source; None where it is not installed."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))) / "srt"
    names: set[str] = set()
    for file in [root / "server_args.py", *sorted((root / "arg_groups" / "fields").glob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                names |= _argument_names(node)
            elif (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
            ):
                names |= _flags(node.args)
    if "max_total_tokens" not in names:
        raise UserError(f"cannot read the names of SGLang's server arguments from {root}: install sglang==0.5.23")
    return names


def _argument_names(declaration: ast.ClassDef) -> set[str]:
    """Fields declared as ``name: A[type, help]``, with the flags spelled out in their metadata."""
    names: set[str] = set()
    for field in declaration.body:
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        keywords = {
            k.arg: k.value for node in ast.walk(field.annotation) if isinstance(node, ast.Call) for k in node.keywords
        }
        if "no_cli" in keywords:
            continue
        spelled = _flags([keywords["cli_name"]]) if "cli_name" in keywords else {field.target.id}
        aliases = keywords.get("aliases")
        names |= spelled | (_flags(aliases.elts) if isinstance(aliases, ast.List) else set())
    return names


def _flags(nodes: list[ast.expr]) -> set[str]:
    values = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {value[2:].replace("-", "_") for value in values if isinstance(value, str) and value.startswith("--")}


def _refuse_reserved(args: Mapping[str, Any]) -> None:
    for name in args:
        if name in RESERVED_ARGS:
            raise UserError(f"sglang.{name}: leave it out, {RESERVED_ARGS[name]}")


def _architecture(model_path: Path) -> str | None:
    config = model_path / "config.json"
    if not config.is_file():
        raise UserError(f"{model_path}: not a Hugging Face model folder, it has no config.json")
    architectures = json.loads(config.read_text()).get("architectures") or [None]
    return architectures[0]
