"""The loop with the real SGLang and the real Megatron-Core, two ranks with expert parallelism."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vespo import assemble, parallel
from megatron_vespo.config_file import load_config, parse_config
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.link import make_link, make_rollouts
from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.policy.objectives import denominators
from megatron_vespo.rollout.own_servers import OwnServers
from megatron_vespo.rollout.server import SGLangServer
from tests.e2e.small_runs import REWARDS, make_tree, run_main_on_ranks, write_config
from tests.ranks import run_ranks


def push_generate_compare(tree: dict[str, Any]) -> list[float]:
    """Three rounds of push, generate, score by the trainer, update; the largest difference of log-probs in each."""
    config = parse_config(tree)
    with ExitStack() as stack:
        architecture = load_architecture(config.model.hf_path)
        tokenizer = load_tokenizer(config.model.hf_path)
        trainer = assemble.make_trainer(config, architecture)
        link = make_link(config, architecture, tokenizer, OwnServers(), stack)
        rollouts = make_rollouts(config, link, trainer, stack)
        algorithm, schedule = assemble.make_algorithm(config), assemble.make_schedule(config, architecture)
        differences = []
        for version in range(3):
            rollouts.weight_sync.push(version)
            if version == 0:
                rollouts.service.start()
            groups = rollouts.service.next_batch()
            samples = [sample for group in groups for sample in group.samples]
            assert all((sample.weight_versions == version).all() for sample in samples)
            plan = schedule.plan(samples).ranks[parallel.data_parallel_rank()]
            log_pi = trainer.policy.log_probs(samples, plan)
            differences.append(
                max(float(np.abs(ours - s.log_mu).max()) for ours, s in zip(log_pi, samples, strict=True))
            )
            algorithm.assign_advantages(groups)
            assert denominators(samples).tokens > 50
            objective = algorithm.objective(trainer.policy, samples, schedule)
            trainer.policy.forward_backward(samples, plan, objective)
            trainer.policy.optim_step()
            if version < 2:
                # A push between taking and releasing, as in the loop: nothing is in flight.
                rollouts.weight_sync.push(version + 1)
                rollouts.service.release()
        return differences


@pytest.mark.parametrize("transport", ["disk", "broadcast", "delta"])
def test_trainer_and_server_agree_after_every_push(sglang_server: SGLangServer, tmp_path: Path, transport: str) -> None:
    tree = make_tree(sglang_server, tmp_path, weight_sync={"transport": transport}, training={"steps": 6})
    for differences in run_ranks(2, push_generate_compare, tree, **tree["megatron"]):
        assert max(differences) < 1e-4, differences


@pytest.mark.parametrize("behavior", ["rollout", "recompute"])
def test_a_run_leaves_what_it_promises(sglang_server: SGLangServer, tmp_path: Path, behavior: str) -> None:
    path = write_config(tmp_path, make_tree(sglang_server, tmp_path, checkpoint={"hf_interval": 1}))
    arguments = [f"rollout.behavior_logprobs={behavior}", "weight_sync.transport=disk"]
    assert run_main_on_ranks(2, path, arguments) == [0, 0]
    folder = tmp_path / "runs" / "run"
    for name in ("config.yaml", "summary.md", "learning_curve.png", "tensorboard", "rollouts/step_000002.jsonl"):
        assert (folder / name).exists(), name
    assert load_config(folder / "config.yaml").training.steps == 2
    records = read_metrics(folder / "metrics.jsonl")
    assert records.steps == [0, 1, 2] and records.unreadable_lines == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3  # one object a step
    for step in records.values[1:]:
        for name in ("vespo/log_w_abs_mean", "vespo/ess_w", "vespo/ess_phi", "vespo/phi_small_share_neg"):
            assert name in step
        assert step["rollout/staleness_max"] == 1  # N = 2: at most N - 1 updates old, and that is reached
    assert records.values[2]["train/policy_version"] == 4
    assert "eval/held/accuracy" in records.values[0] and "eval/held/accuracy" in records.values[2]
    assert sorted(path.name for path in (folder / "hf").iterdir()) == ["latest", "step_000001", "step_000002"]
    assert not (folder / "weights").exists()  # the disk transport cleans up


BAD_INPUTS = {
    "reward function that raises": ([f"reward.function={REWARDS}:failing"], "no partial credit"),
    "reward function that is missing": ([f"reward.function={REWARDS}:no_such"], "no_such"),
    "prompt longer than the context": (
        ["rollout.max_new_tokens=511", "training.max_tokens_per_microbatch=512"],
        "the limit is 1",
    ),
    "no room for a prompt": (["rollout.max_new_tokens=600"], "leaves no room for a prompt"),
    "a sample longer than a microbatch": (
        ["training.max_tokens_per_microbatch=20"],
        "training.max_tokens_per_microbatch=20 cannot hold",
    ),
    "unknown kernel parameter": (["algorithm.kernel_params={c9: 1}"], "algorithm.kernel_params"),
    "server that is not there": (["rollout.server.url='http://127.0.0.1:9'"], "127.0.0.1:9"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_one_clear_error(
    sglang_server: SGLangServer, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, message = BAD_INPUTS[name]
    tree = make_tree(sglang_server, tmp_path)
    Path(tree["data"]["train"]).write_text(json.dumps({"prompt": [5, 6], "label": "x"}) + "\n")
    path = write_config(tmp_path, tree)
    assert run_main_on_ranks(2, path, overrides) == [1, 1]
    printed = capfd.readouterr().err
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0], printed
    assert "Traceback" not in printed
    assert not (tmp_path / "runs" / "run" / "hf").exists()
    sglang_server.check_alive()  # a server that is not the run's own is left alone


WEIGHTS = {"ids": 1.0, "short": -0.5, "overlong": 2.0}
TERMS = [
    {"function": f"{REWARDS}:of_ids", "name": "ids", "sources": ["numbers", "held"]},
    {"function": f"{REWARDS}:of_length", "name": "short", "sources": ["talk"]},
    {"function": "overlong", "params": {"max_tokens": 24, "buffer_tokens": 16}},
]


@pytest.fixture(scope="module")
def asynchronous_run(sglang_server: SGLangServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that generates ahead, with prompts of two sources and a reward of several terms."""
    folder = tmp_path_factory.mktemp("asynchronous")
    prompts = str(folder / "prompts.jsonl")
    tree = make_tree(
        sglang_server,
        folder,
        data={"train": {"numbers": prompts, "talk": prompts}, "evaluation": {"held": prompts}},
        rollout={"max_staleness": 1},
        training={"steps": 5},
        logging={"rollout_groups": 4},
    )
    tree["reward"] = {"terms": [{**term, "weight": WEIGHTS[term.get("name", "overlong")]} for term in TERMS]}
    assert run_main_on_ranks(2, write_config(folder, tree), []) == [0, 0]
    return folder / "runs" / "run"


def test_generation_runs_ahead_within_the_staleness_bound(asynchronous_run: Path) -> None:
    staleness = read_metrics(asynchronous_run / "metrics.jsonl").series("rollout/staleness_max")[1]
    assert max(staleness) == (1 + 1) * 2 - 1  # (S + 1) * N - 1, and it is reached


def test_the_reward_is_a_sum_of_terms_chosen_by_source(asynchronous_run: Path) -> None:
    values = read_metrics(asynchronous_run / "metrics.jsonl").values
    assert values[0]["eval/held/reward_failed_share"] == 0  # its name is among the sources of a term
    overlong = []
    for step in range(1, 6):
        lines = (asynchronous_run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        for sample in samples:
            terms = sample["reward_terms"]
            assert list(terms) == [{"numbers": "ids", "talk": "short"}[sample["data_source"]], "overlong"]
            assert terms.get("short", sample["length"]) == sample["length"]
            assert terms["overlong"] == pytest.approx(-max(0, sample["length"] - 8) / 16)
            assert sample["reward"] == pytest.approx(sum(WEIGHTS[name] * value for name, value in terms.items()))
            overlong.append(terms["overlong"])
        for name in WEIGHTS:
            of_term = [sample["reward_terms"][name] for sample in samples if name in sample["reward_terms"]]
            assert values[step][f"reward/{name}"] == pytest.approx(np.mean(of_term))
        for source in {sample["data_source"] for sample in samples}:
            of_source = [sample["reward"] for sample in samples if sample["data_source"] == source]
            assert values[step][f"reward/source/{source}"] == pytest.approx(np.mean(of_source))
        assert len(samples) == 16 and any(sample["advantage"] for sample in samples)
    assert len(set(overlong)) > 2
