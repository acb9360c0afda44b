"""The examples for GPU nodes: every file is checked as a run would be, but for files that are not here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from examples.digits_cpu import task as digits
from megatron_vespo.algorithms.vespo import VespoParams
from megatron_vespo.config import Config
from megatron_vespo.config_file import load_config
from megatron_vespo.data.published import FORMATS
from megatron_vespo.estimate.devices import DEVICES
from megatron_vespo.estimate.estimate import Estimate, estimate, facts_of
from megatron_vespo.estimate.report import describe_estimate
from megatron_vespo.megatron_options import check_megatron_options
from megatron_vespo.metrics.conditions import choose_conditions, stop_after
from megatron_vespo.models.build import ddp_config, transformer_config
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.plan.check import check_plan
from megatron_vespo.rewards.loader import load_reward
from megatron_vespo.rollout.server_args import validate_server_args
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
ARCHITECTURES = ROOT / "tests" / "fixtures" / "architectures"
# Configuration -> nodes.
MATHEMATICS = {"qwen3_8b/async": 1, "qwen3_30b_a3b/sync": 2, "qwen3_30b_a3b/async": 2, "qwen3_235b_a22b/sync": 16}
PRODUCTION = {**MATHEMATICS, "code_rl/async": 1}
# Configuration -> ranks, on one node without GPUs.
SMALL = {
    "calculator/rl": 2,
    "calculator/sft": 2,
    "digits_cpu/rl": 2,
    "digits_cpu/sft": 2,
    "layouts_cpu/config": 1,
    "reasoning_cpu/rl": 2,
    "reasoning_cpu/sft": 2,
}


def load(name: str, *overrides: str) -> Config:
    return load_config(EXAMPLES / f"{name}.yaml", overrides)


def architecture_of(name: str) -> Path:
    return ARCHITECTURES / load(name).model.hf_path.removeprefix("models/").lower().replace("-", "_")


def estimated(name: str, *overrides: str) -> Estimate:
    architecture = load_architecture(architecture_of(name))
    return estimate(load(name, *overrides), architecture, DEVICES["h100"], nodes=PRODUCTION[name])


def test_every_configuration_is_one_of_these() -> None:
    grids = set(EXAMPLES.glob("staleness_lab/*.yaml"))
    jobs = set(EXAMPLES.glob("kubernetes/*.yaml"))
    found = {str(path.relative_to(EXAMPLES).with_suffix("")) for path in {*EXAMPLES.rglob("*.yaml")} - grids - jobs}
    assert found == PRODUCTION.keys() | SMALL.keys()


@pytest.mark.parametrize("name", PRODUCTION)
def test_the_estimate_says_that_it_fits(name: str) -> None:
    result = estimated(name)
    assert result.problems == []
    assert result.warnings == []


@pytest.mark.parametrize("name", SMALL)
def test_the_plan_of_a_small_example(tmp_path: Path, name: str) -> None:
    digits.write_model(tmp_path)
    assert check_plan(load(name), facts_of(load_architecture(tmp_path)), SMALL[name], SMALL[name]) == []


@pytest.mark.parametrize("name", PRODUCTION)
def test_all_names_are_known_upstream(name: str) -> None:
    config = load(name)
    check_megatron_options(config.megatron)
    validate_server_args(config.sglang)
    choose_conditions(config.health.warn)
    stop_after(config.health.stop_when)
    assert callable(load_reward(config.reward.function, config.reward.params))
    assert config.rollout.server.device == "cuda" and config.model.layer_spec == "transformer_engine"
    # A request for the longest sample, with what SGLang keeps back.
    longest = (config.rollout.max_prompt_tokens or 0) + config.rollout.max_new_tokens
    assert longest + 2 <= config.sglang["context_length"]
    assert longest - 1 <= config.training.max_tokens_per_microbatch


def configs(name: str, architecture: Path) -> tuple[Any, ...]:
    config = load(name)
    section = dict(config.megatron)
    transformer = transformer_config(load_architecture(architecture), section, config.model.layer_spec)
    ddp = ddp_config(section)
    return transformer.num_layers, transformer.pipeline_model_parallel_size, ddp.grad_reduce_in_fp32


@pytest.mark.parametrize("name", PRODUCTION)
def test_megatron_takes_the_options(name: str) -> None:
    config = load(name)
    ((layers, stages, in_fp32),) = run_ranks(1, configs, name, architecture_of(name))
    assert layers in (36, 48, 94) and in_fp32
    assert stages == config.megatron.get("pipeline_model_parallel_size", 1)


@pytest.mark.parametrize("name", PRODUCTION)
def test_data_are_what_prepare_data_writes(name: str) -> None:
    config = load(name)
    assert isinstance(config.data.train, str)
    paths = [Path(config.data.train), *(Path(str(path)) for path in config.data.evaluation.values())]
    assert len({path.parent for path in paths}) == 1, "one call of prepare_data keeps training and evaluation apart"
    assert all(path.suffix == ".jsonl" and path.stem in FORMATS for path in paths)
    assert list(config.data.evaluation) == [path.stem for path in paths[1:]]
    kinds = {FORMATS[path.stem].kind for path in paths}
    assert kinds == {config.reward.function}


@pytest.mark.parametrize("name", MATHEMATICS)
def test_how_the_contests_are_evaluated(name: str) -> None:
    evaluation = load(name).evaluation
    samples = {one: evaluation.of_set(one).samples_per_prompt for one in load(name).data.evaluation}
    assert samples == {"aime_2024": 32, "aime_2025": 32, "amc_2023": 32, "math_500": 4}
    assert (evaluation.temperature, evaluation.top_p) == (1.0, 0.7) and evaluation.interval == 20


@pytest.mark.parametrize("name", MATHEMATICS)
def test_the_setting_is_the_papers(name: str) -> None:
    config = load(name)
    assert (config.rollout.samples_per_prompt, config.rollout.max_prompt_tokens) == (8, 1024)
    assert config.rollout.max_new_tokens == 15_360 and config.megatron["lr"] == 1e-6
    assert config.algorithm.kernel == "vespo" and config.algorithm.kl_coef == 0 and not config.algorithm.kernel_params
    params = VespoParams()
    assert (params.c1_pos, params.c2_pos, params.c1_neg, params.c2_neg) == (2, 3, 3, 2)
    if not name.startswith("qwen3_8b"):
        assert config.rollout.prompts_per_step == 256
    synchronous = name.endswith("/sync")
    assert (config.rollout.max_staleness == 0) == synchronous
    assert config.training.minibatches_per_step == (8 if synchronous else 4)
    assert config.placement.mode == ("colocate" if synchronous else "disaggregated")


def quoted(readme: Path) -> list[tuple[str, list[str]]]:
    """Blocks of what the estimate printed: the configuration's name and the lines."""
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in readme.read_text().splitlines():
        match = re.fullmatch(r"    \$ python tools/estimate.py examples/(\S+).yaml --nodes (\d+) --gpu h100", line)
        if match:
            assert int(match[2]) == PRODUCTION[match[1]]
            blocks.append((match[1], []))
        elif inside and line.startswith("    "):
            blocks[-1][1].append(line[4:])
        inside = bool(match) or (inside and line.startswith("    "))
    return blocks


@pytest.mark.parametrize("folder", sorted({Path(name).parent.name for name in PRODUCTION}))
def test_readmes_quote_the_estimate_as_it_is_printed(folder: str) -> None:
    blocks = quoted(EXAMPLES / folder / "README.md")
    assert {name for name, _ in blocks} == {name for name in PRODUCTION if name.startswith(folder)}
    for name, lines in blocks:
        printed = describe_estimate(load(name), estimated(name)).splitlines()
        expected = [line for line in printed if not line.startswith(("  --", "assumed"))]
        assert lines == expected, "python tools/estimate.py prints something else now; quote it anew"


def test_options_that_the_readmes_name() -> None:
    fp8 = "megatron.fp8=e4m3", "megatron.fp8_recipe=blockwise"
    served = "sglang.quantization=fp8", "sglang.ep_size=4"
    assert estimated("qwen3_30b_a3b/sync", *fp8, *served).problems == []
    (problem,) = estimate_on_one_node().problems
    assert "86.1 of 79.6 GiB" in problem
    assert estimated("qwen3_235b_a22b/sync", served[0], "sglang.ep_size=8").problems == []
    assert estimated("qwen3_8b/async", "sglang.kv_cache_dtype=fp8_e4m3", "placement.servers_per_node=6").problems == []


def estimate_on_one_node() -> Estimate:
    architecture = load_architecture(ARCHITECTURES / "qwen3_30b_a3b")
    return estimate(load("qwen3_30b_a3b/sync"), architecture, DEVICES["h100"], nodes=1)


SCRIPTS = sorted({EXAMPLES / Path(name).parent / "run.sh" for name in PRODUCTION})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.parent.name)
def test_scripts_start_as_many_ranks_as_the_estimate_counts(script: Path, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    environment = {"PYTHON": str(fake), "NODE_RANK": "1", "MASTER_ADDR": "n0", "PATH": "/usr/bin:/bin"}
    environment["VESPO_SERVER_KEY"] = "secret"
    for name in [name for name in PRODUCTION if name.startswith(script.parent.name + "/")]:
        which = [Path(name).name] if script.parent.name == "qwen3_30b_a3b" else []
        command = ["bash", str(script), *which, "training.steps=1"]
        printed = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        cluster = estimated(name).cluster
        assert re.search(rf"--(nproc-per-node|ranks) {cluster.ranks_per_node} ", printed)
        assert f"examples/{name}.yaml training.steps=1" in printed
        if cluster.nodes > 1:
            assert f"--nnodes {cluster.nodes} --node-rank 1 --master-addr n0 " in printed
            without = {key: value for key, value in environment.items() if key != "VESPO_SERVER_KEY"}
            assert subprocess.run(command, env=without, cwd=ROOT, capture_output=True).returncode != 0
