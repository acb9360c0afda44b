"""Conversations with tools in real runs: trainer and sampler agree on every token that the policy said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vespo.metrics.records import Records, read_metrics
from megatron_vespo.rollout.batches import list_batches, load_batch
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.types import GENERATE_FAILED, Sample
from tests.e2e.small_runs import make_tree, run_main_on_ranks, write_config
from tests.e2e.turns import INSERTED

TURNS = Path(__file__).with_name("turns.py")


def run(server: SGLangServer, folder: Path, function: str, **sections: dict[str, Any]) -> tuple[Records, list[Sample]]:
    rollout = {"generate": f"{TURNS}:{function}", "save_batches": True, **sections.pop("rollout", {})}
    tree = make_tree(server, folder, rollout=rollout, **sections)
    assert run_main_on_ranks(2, write_config(folder, tree), ["data.evaluation={}"]) == [0, 0]
    run = folder / "runs" / "run"
    groups = [group for file in list_batches(run / "rollouts") for group in load_batch(file).groups]
    return read_metrics(run / "metrics.jsonl"), [sample for group in groups for sample in group.samples]


def check_account(sample: Sample) -> None:
    ids = sample.sequence_ids.tolist()
    assert [ids[place] for place in sample.offsets] == sample.response_ids.tolist()
    assert sample.inserted_ids is not None and len(sample.inserted_ids) == 6
    first = int(sample.inserted_before[0])  # type: ignore[index]
    assert 1 <= first <= 6 and ids[first : first + 3] == INSERTED
    assert len(sample.response_ids) == len(sample.log_mu) == len(sample.weight_versions) <= 18
    assert (np.diff(sample.weight_versions) >= 0).all()


def test_trainer_and_sampler_agree_on_fresh_conversations(sglang_server: SGLangServer, tmp_path: Path) -> None:
    training = {"steps": 3, "minibatches_per_step": 1}
    records, samples = run(sglang_server, tmp_path, "three_turns", training=training)
    assert len(samples) == 3 * 16
    for sample in samples:
        check_account(sample)
    assert max(records.series("train/log_ratio_abs_max")[1]) < 1e-4
    assert records.series("rollout/inserted_tokens_mean")[1] == [6.0] * 3
    lengths = [np.mean([len(s.response_ids) for s in samples[16 * step : 16 * step + 16]]) for step in range(3)]
    assert records.series("rollout/response_length_mean")[1] == pytest.approx(lengths)


@pytest.mark.parametrize("pause", ["retract", "abort"])
def test_pushes_between_and_into_turns(sglang_server: SGLangServer, tmp_path: Path, pause: str) -> None:
    records, samples = run(
        sglang_server,
        tmp_path,
        "three_turns",
        training={"steps": 8, "minibatches_per_step": 2},
        rollout={"max_staleness": 2},
        weight_sync={"pause": pause},
        megatron={"lr": 3e-3},
    )
    for sample in samples:
        check_account(sample)
    assert sum(sample.weight_versions[0] != sample.weight_versions[-1] for sample in samples) >= 4
    # Tokens that the newest weights sampled, most of them after turns of older ones: exactly the trainer's policy.
    fresh = records.series("health/kl_fresh")[1]
    assert fresh and max(fresh) < 1e-7
    assert max(records.series("rollout/staleness_max")[1]) <= 5


def test_a_function_that_fails_costs_its_samples(sglang_server: SGLangServer, tmp_path: Path) -> None:
    records, samples = run(sglang_server, tmp_path, "failing")
    failed = [sample for sample in samples if sample.reward_error]
    assert failed and all(sample.prompt.index % 4 == 1 for sample in failed)
    assert all(sample.reward_error == f"{GENERATE_FAILED}LookupError: no such tool" for sample in failed)
    assert all(sample.advantage == 0 for sample in failed)
    assert records.series("rollout/generate_failed_share")[1] == [0.25, 0.25]
    assert records.series("rollout/reward_failed_share")[1] == [0.25, 0.25]
