"""Rollout batches are saved, replayed without a server, and generated without a trainer."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.rollout.batches import RolloutBatch, list_batches, load_batch, save_batch
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.server import SGLangServer
from tests.e2e import reward_functions
from tests.e2e.conftest import VOCAB_SIZE
from tests.e2e.small_runs import make_tree, run_main_on_ranks, write_config
from tests.e2e.test_launch import launch, make_config

# Nothing listens there, and the server of the session must not be needed.
NO_SERVER = ["rollout.server.url='http://127.0.0.1:9'", "data.train=null"]
TIMES = ("perf/", "eval/")


def metrics_of(folder: Path, name: str) -> list[dict[str, float]]:
    """The metrics of each step, without times and evaluation."""
    records = read_metrics(folder / "runs" / name / "metrics.jsonl")
    rows = zip(records.steps, records.values, strict=True)
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for step, row in rows if step]


def weights_of(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The trained weights of a run."""
    files = list((folder / "runs" / name / "hf" / "latest").glob("*.safetensors"))
    assert files
    return {name: weight for file in files for name, weight in load_file(file).items()}


def load_all(folder: Path) -> list[RolloutBatch]:
    return [load_batch(path) for path in list_batches(folder)]


def replay(config: Path, saved: Path, *overrides: str, name: str = "replay") -> list[int]:
    arguments = [f"run.name={name}", f"rollout.replay={saved}", *NO_SERVER, *overrides]
    return run_main_on_ranks(2, config, arguments)


def test_a_replay_repeats_the_run(
    sglang_server: SGLangServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, make_tree(sglang_server, tmp_path))
    assert run_main_on_ranks(2, config, ["rollout.save_batches=true"]) == [0, 0]
    saved = tmp_path / "runs" / "run" / "rollouts"
    batches = load_all(saved)
    assert [(b.step, b.policy_version, b.temperature, b.vocab_size) for b in batches] == [
        (1, 0, 0.8, VOCAB_SIZE),
        (2, 2, 0.8, VOCAB_SIZE),
    ]
    for batch in batches:
        samples = [sample for group in batch.groups for sample in group.samples]
        assert len(samples) == 16 and any(sample.advantage for sample in samples)
        assert all((sample.weight_versions == batch.policy_version).all() for sample in samples)
        assert [sample.reward for sample in samples] == [reward_functions.of_ids(sample) for sample in samples]

    capfd.readouterr()
    assert replay(config, saved) == [0, 0]
    printed = capfd.readouterr().out
    assert printed.count("without evaluation") == 1 and "SGLang" not in printed
    original, again = metrics_of(tmp_path, "run"), metrics_of(tmp_path, "replay")
    assert len(original) == len(again) == 2
    for before, after in zip(original, again, strict=True):
        generated = {"rollout/dropped_groups", "rollout/restarted_groups"}  # which a replay does not do
        before = {name: value for name, value in before.items() if name not in generated}
        assert len(before) > 30 and after == pytest.approx(before, rel=1e-4, abs=1e-6)
    assert not read_metrics(tmp_path / "runs" / "replay" / "metrics.jsonl").eval_sets()
    before, after = weights_of(tmp_path, "run"), weights_of(tmp_path, "replay")
    for name, weight in before.items():
        np.testing.assert_allclose(after[name], weight, atol=1e-5, err_msg=name)
    assert f"replayed from {saved}" in (tmp_path / "runs" / "replay" / "summary.md").read_text()


SHIFT = 0.125


def shift_log_mu(source: Path, target: Path) -> None:
    """The same batches, as if a sampler had found each token likelier than it did."""
    target.mkdir()
    for path in list_batches(source):
        batch = load_batch(path)
        for group in batch.groups:
            for sample in group.samples:
                sample.log_mu += SHIFT
        header = {"step": batch.step, "policy_version": batch.policy_version, "temperature": batch.temperature}
        save_batch(target / path.name, batch.groups, **header, vocab_size=batch.vocab_size)


def test_log_mu_is_kept_as_it_was_sampled(sglang_server: SGLangServer, control: SGLangControl, tmp_path: Path) -> None:
    """Batches without a trainer, from the weights that training starts from; then trained on offline."""
    control.update_weights_from_disk(sglang_server.model_path, version=0)
    config = write_config(tmp_path, make_tree(sglang_server, tmp_path))
    assert run_main_on_ranks(1, config, ["objective=rollout", "training.steps=1"]) == [0]
    shifted = tmp_path / "shifted"
    shift_log_mu(tmp_path / "runs" / "run" / "rollouts", shifted)
    tokens = [len(sample.response_ids) for group in load_all(shifted)[0].groups for sample in group.samples]

    once = ["training.steps=1", "training.minibatches_per_step=1", "rollout.save_batches=true"]
    for behavior in ("rollout", "recompute", "both"):
        assert replay(config, shifted, *once, f"rollout.behavior_logprobs={behavior}", name=behavior) == [0, 0]
    (sampled,), (recomputed,) = metrics_of(tmp_path, "rollout"), metrics_of(tmp_path, "recompute")
    assert sampled["vespo/log_w_mean"] == pytest.approx(-SHIFT * np.mean(tokens), rel=1e-3)
    assert abs(recomputed["vespo/log_w_mean"]) < 1e-4  # the trainer's own took their place ...
    again = tmp_path / "runs" / "recompute" / "rollouts" / "batch_000001.msgpack"
    assert again.read_bytes() == (tmp_path / "runs" / "rollout" / "rollouts" / again.name).read_bytes()
    for ours, theirs in zip(load_batch(again).groups, load_all(shifted)[0].groups, strict=True):
        for a, b in zip(ours.samples, theirs.samples, strict=True):
            np.testing.assert_array_equal(a.log_mu, b.log_mu)  # ... but not in the file

    # Both: W is the sampler's, in two parts.
    (both,) = metrics_of(tmp_path, "both")
    for name in ("vespo/log_w_mean", "vespo/phi_mean", "train/grad_norm"):
        assert both[name] == pytest.approx(sampled[name], rel=1e-4), name
    assert abs(both["vespo/log_w_drift_mean"]) < 1e-4
    assert both["vespo/log_w_mismatch_mean"] == pytest.approx(sampled["vespo/log_w_mean"], rel=1e-3)
    assert "vespo/log_w_drift_mean" not in sampled

    # A clipped method with a correction, a second update, a reference policy and an entropy term.
    grpo = [
        "training.minibatches_per_step=2",
        "rollout.behavior_logprobs=both",
        "algorithm.kernel=grpo",
        "algorithm.corrections={tis: {}}",
        "algorithm.kl_coef=0.1",
        "algorithm.entropy_coef=0.01",
    ]
    assert replay(config, shifted, *once, *grpo, name="grpo") == [0, 0]
    (corrected,) = metrics_of(tmp_path, "grpo")
    # W is below 1 for every token, and so is the correction: the first minibatch's weights are exp(-SHIFT).
    assert corrected["vespo/phi_mean"] == pytest.approx(np.exp(-SHIFT), rel=0.02)
    assert corrected["train/kl_ref"] > 0 and corrected["vespo/log_w_drift_abs_mean"] > 0


def set_version(server: SGLangServer, version: str) -> None:
    """Load the weights that the server started from, under a name of any kind."""
    body = {"model_path": str(server.model_path), "weight_version": version, "flush_cache": True}
    assert httpx.post(f"{server.url}/update_weights_from_disk", json=body, timeout=60).json()["success"]


def test_rollouts_alone_and_training_on_them_later(
    sglang_server: SGLangServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_version(sglang_server, "default")  # as of a server that nobody pushed to
    config = write_config(tmp_path, make_tree(sglang_server, tmp_path, evaluation={"interval": 1}))
    # The trainer's layout and minibatches are left as they are, and do not matter.
    assert run_main_on_ranks(1, config, ["objective=rollout", "training.steps=3", "run.name=alone"]) == [0]
    printed = capfd.readouterr().out
    assert "no trainer: sampling from" in printed and "held-out accuracy of held: " in printed
    folder = tmp_path / "runs" / "alone"
    for name in ("summary.md", "learning_curve.png", "tensorboard", "config.yaml", "rollouts/step_000003.jsonl"):
        assert (folder / name).exists(), name
    assert "finished, 3 steps" in (folder / "summary.md").read_text()
    records = read_metrics(folder / "metrics.jsonl")
    assert records.steps == [0, 1, 2, 3]
    assert records.series("eval/held/accuracy")[0] == [0]  # the weights never change
    assert not any(name.startswith(("train/", "vespo/")) for row in records.values for name in row)

    batches = load_all(folder / "rollouts")
    assert [(batch.step, batch.policy_version) for batch in batches] == [(1, 0), (2, 0), (3, 0)]
    for batch, row in zip(batches, records.values[1:], strict=True):
        samples = [sample for group in batch.groups for sample in group.samples]
        assert all((sample.weight_versions == 0).all() for sample in samples)
        assert row["rollout/reward_mean"] == pytest.approx(
            np.mean([reward_functions.of_ids(sample) for sample in samples])
        )
        assert any(sample.advantage for sample in samples)
    order = [group.prompt.index for batch in batches for group in batch.groups]
    assert order == list(range(12))

    assert replay(config, folder / "rollouts", "training.steps=3", "training.minibatches_per_step=1") == [0, 0]
    trained = metrics_of(tmp_path, "replay")
    assert trained[0]["vespo/log_w_abs_max"] < 1e-3  # the same weights
    assert trained[2]["vespo/log_w_abs_max"] > 10 * trained[0]["vespo/log_w_abs_max"]
    assert [row["rollout/staleness_max"] for row in trained] == [0, 1, 2]
    assert [row["rollout/reward_mean"] for row in trained] == [
        pytest.approx(row["rollout/reward_mean"]) for row in records.values[1:]
    ]


def the_error(printed: str) -> str:
    """The one line that a user sees, though several ranks failed."""
    errors = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in printed, printed
    return errors[0]


def test_weights_that_a_trainer_pushed_are_refused(
    sglang_server: SGLangServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    set_version(sglang_server, "5")
    config = write_config(tmp_path, make_tree(sglang_server, tmp_path))
    assert run_main_on_ranks(1, config, ["objective=rollout"]) == [1]
    assert "serves weight version 5, which a trainer pushed" in the_error(capfd.readouterr().err)


BAD_BATCHES: dict[str, tuple[list[str], str]] = {
    "temperature": (["rollout.temperature=0.5"], "batch_000001.msgpack: sampled at temperature 0.8"),
    "second file cut": ([], "batch_000002.msgpack: truncated"),
    "too few": (["training.steps=3"], "holds 2 saved rollout batches"),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_batches_that_cannot_be_replayed(
    sglang_server: SGLangServer, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides, message = BAD_BATCHES[name]
    set_version(sglang_server, "0")
    config = write_config(tmp_path, make_tree(sglang_server, tmp_path))
    assert run_main_on_ranks(1, config, ["objective=rollout"]) == [0]
    saved = tmp_path / "runs" / "run" / "rollouts"
    if name == "second file cut":
        path = saved / "batch_000002.msgpack"
        path.write_bytes(path.read_bytes()[:-20])
    capfd.readouterr()
    assert replay(config, saved, *overrides) == [1, 1]
    printed = capfd.readouterr()
    assert message in the_error(printed.err)
    assert ("building the model" in printed.out) == (name == "second file cut")


def test_rollouts_alone_start_a_server_of_their_own(tmp_path: Path) -> None:
    config = make_config(tmp_path, objective="rollout", training={"steps": 2})  # type: ignore[arg-type]
    result = launch(config)
    assert result.returncode == 0, result.stderr
    batches = load_all(tmp_path / "runs" / "run" / "rollouts")
    versions = [s.weight_versions for batch in batches for group in batch.groups for s in group.samples]
    assert len(versions) == 8 and all((version == 0).all() for version in versions)
    refused = launch(config, "run.name=two", ranks=2)
    assert refused.returncode == 1 and "runs on one rank, not on 2" in refused.stderr
    assert not (tmp_path / "runs" / "two").exists()


def test_the_saved_files_are_all_there_is(sglang_server: SGLangServer, tmp_path: Path) -> None:
    """A run that is not told to keeps no batches."""
    config = write_config(tmp_path, make_tree(sglang_server, tmp_path))
    assert run_main_on_ranks(2, config, ["training.steps=1"]) == [0, 0]
    assert list_batches(tmp_path / "runs" / "run" / "rollouts") == []
