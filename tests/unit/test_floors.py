"""Imports go down only; the policy floor and the rollout floor never import each other."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = "megatron_vespo"
ROOT = Path(__file__).parents[2]

WORDS = {
    "config",
    "config_file",
    "megatron_options",
    "types",
    "errors",
    "upstream",
    "files",
    "codec",
    "dotted",
    "fp8_format",
    "guard",
    "gpus",
    "checkpoint_folder",
    "processes",
    "stopping",
    "run_folder",
}
PURE = {"algorithms", "batching", "rewards"}
RUNTIME = {"platform", "parallel", "metrics", "logs", "watchdog", "rendezvous"}
POLICY = {"models", "policy"}
ROLLOUT = {"data", "rollout", "sglang_cpu", "sglang_weights"}
MEETING = {"weight_sync", "evaluation"}
# Of the top floor: what only reads the folders of runs.
READERS = {"page", "report"}
BELOW_POLICY = WORDS | PURE | RUNTIME
BELOW_TOP = BELOW_POLICY | POLICY | ROLLOUT | MEETING

# Part -> the parts of our package that it may import.
ALLOWED = {
    **dict.fromkeys(WORDS, WORDS),
    **dict.fromkeys(PURE, WORDS | PURE),
    **dict.fromkeys(RUNTIME, BELOW_POLICY),
    **dict.fromkeys(POLICY, BELOW_POLICY | POLICY),
    **dict.fromkeys(ROLLOUT, BELOW_POLICY | ROLLOUT),
    **dict.fromkeys(MEETING, BELOW_TOP),
    **dict.fromkeys(READERS, BELOW_POLICY | READERS),
    # Of the policy floor these know only a model's configuration.
    "inputs": BELOW_POLICY | ROLLOUT | {"inputs", "models"},
    "recorders": BELOW_POLICY | ROLLOUT | {"recorders", "record", "models"},
    "evaluate": BELOW_TOP - {"policy", "weight_sync"} | {"checks", "connect", "inputs", "train"},
    "link": BELOW_TOP | {"assemble", "connect", "inputs", "loop", "parts", "preflight"},
}
# Part -> packages of others that it must not import.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(WORDS, ("torch", "megatron", "sglang", "transformers")),
    **dict.fromkeys(PURE, ("megatron", "sglang", "aiohttp", "requests")),
    **dict.fromkeys(POLICY, ("sglang",)),
    **dict.fromkeys(ROLLOUT, ("megatron",)),
    **dict.fromkeys(READERS, ("torch", "megatron", "sglang", "transformers")),
    **dict.fromkeys(("inputs", "recorders", "evaluate", "link"), ("megatron", "sglang")),
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@cache
def imports(source: str) -> tuple[str, ...]:
    """Full names of what a source imports, anywhere in it: ``from a import b`` is a.b."""
    return tuple(_imports(source))


def _imports(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(name: str) -> str:
    """megatron_vespo.<part>.anything -> part; the package itself is ''."""
    return [*name.split("."), ""][1]


def breaches(module: str, source: str) -> list[str]:
    """What this module may not import."""
    here = part(module)

    def breach(name: str) -> bool:
        top = name.split(".")[0]
        if top == PACKAGE:
            return here in ALLOWED and part(name) not in ALLOWED[here]
        return top in FORBIDDEN.get(here, ())

    return [name for name in imports(source) if breach(name)]


SOURCES = {module_name(path): path.read_text() for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def reached_from(module: str) -> set[str]:
    """The modules that importing this one may import, over any number of steps, packages above them included."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        while name and not is_module(name):
            name = name.rpartition(".")[0]
        if not name or name in seen or name not in SOURCES:
            continue
        seen.add(name)
        pending += [name.rpartition(".")[0], *(n for n in imports(SOURCES[name]) if n.startswith(PACKAGE))]
    return seen


def test_every_named_part_is_there() -> None:
    missing = [name for name in ALLOWED if not is_module(f"{PACKAGE}.{name}")]
    assert not missing


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_go_down_only(module: str) -> None:
    assert not breaches(module, SOURCES[module])


@pytest.mark.parametrize("module", [name for name in sorted(SOURCES) if part(name) in WORDS | PURE | ROLLOUT | READERS])
def test_megatron_is_not_reached_in_a_roundabout_way(module: str) -> None:
    reached = {name for name in reached_from(module) for n in imports(SOURCES[name]) if n.split(".")[0] == "megatron"}
    assert not reached


def test_whoever_imports_megatron_prepares_the_platform_first() -> None:
    """Elsewhere a sorted import puts Megatron before our modules, and so before ``platform.prepare()``."""
    importers = {
        part(name) for name, source in SOURCES.items() for n in imports(source) if n.split(".")[0] == "megatron"
    }
    assert importers <= {"platform", "parallel", *POLICY, "weight_sync"}


def test_only_parallel_reads_megatrons_parallel_state() -> None:
    readers = {name for name, source in SOURCES.items() for n in imports(source) if "parallel_state" in n}
    assert readers == {f"{PACKAGE}.parallel"}


@pytest.mark.parametrize(
    "module, source",
    [
        ("config", "import torch"),
        ("types", "from megatron_vespo.batching import split_minibatches"),
        ("algorithms.loss", "from megatron.core import parallel_state"),
        ("batching", "from megatron_vespo import parallel"),
        ("metrics.sinks", "from megatron_vespo.policy import policy"),
        ("policy.policy", "def f():\n    from megatron_vespo.rollout.buffer import RolloutBuffer"),
        ("models.build", "import megatron_vespo.data.prompts"),
        ("rollout.client", "from megatron_vespo.models.registry import load_architecture"),
        ("data.prompts", "import megatron.core"),
        ("evaluation", "from megatron_vespo.loop import train_rl"),
        ("page.run", "from megatron_vespo.rollout.batches import load_batch"),
        ("report", "import torch"),
        ("inputs", "from megatron_vespo.connect import Connection"),
        ("recorders", "from megatron_vespo.loop import train_rl"),
        ("evaluate", "from megatron_vespo.training import run"),
        ("link", "from megatron_vespo.train import main"),
    ],
)
def test_a_breach_is_seen(module: str, source: str) -> None:
    assert breaches(f"{PACKAGE}.{module}", source)
