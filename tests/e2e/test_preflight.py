"""Faults of a real server that the trainer is not told of: the pre-flight refuses, the panel names the cause."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_vespo.metrics.records import read_metrics
from megatron_vespo.models.export import HfExporter
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.server import SGLangServer
from tests.e2e.small_runs import make_tree, run_main, write_config
from tests.ranks import run_ranks
from tests.tiny_models import EOS_ID, make_tiny_qwen3_moe

LONG = 600
SHORT = "rollout.max_new_tokens=120"


@pytest.fixture(scope="module")
def server(sglang_server: SGLangServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """A server of a model that says long things: its end of sequence is one token in a thousand."""
    folder = tmp_path_factory.mktemp("talkative")
    model = make_tiny_qwen3_moe(folder / "model", vocab_size=512, max_position_embeddings=1024)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"][EOS_ID] = 0
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with SGLangServer(model, folder / "server.log", args={"max_total_tokens": 32768}) as server:
        server.wait_ready()
        yield server


def hide(fault: str) -> None:
    """Make this process ask the server for something else than it trains for."""
    if fault == "permuted experts":
        stream = HfExporter.stream

        def permuted(self: HfExporter) -> Iterator[list[tuple[str, Any]]]:
            for bucket in stream(self):
                yield [(_next_expert(name), tensor) for name, tensor in bucket]

        HfExporter.stream = permuted  # type: ignore[method-assign, assignment]
        return
    body, hidden = SamplingParams.body, {"temperature": {"temperature": 0.9}, "top-p": {"top_p": 0.9}}.get(fault, {})
    SamplingParams.body = lambda self, limit: {**body(self, limit), **hidden}  # type: ignore[method-assign]


def _next_expert(name: str) -> str:
    head, found, tail = name.partition(".experts.")
    number, _, rest = tail.partition(".")
    return f"{head}.experts.{(int(number) + 1) % 4}.{rest}" if found else name


def run_hidden(fault: str, path: Path, overrides: list[str]) -> int:
    hide(fault)
    return run_main(path, overrides)


def run(server: SGLangServer, folder: Path, fault: str, *overrides: str) -> int:
    tree = make_tree(
        server,
        folder,
        rollout={"max_new_tokens": LONG, "temperature": 1.0},
        training={"steps": 1, "max_tokens_per_microbatch": 1024},
        preflight={"prompts": 4},
    )
    tree["megatron"] = {"lr": 1e-3}
    tree["data"].pop("evaluation")
    path = write_config(folder, tree)
    (status,) = run_ranks(1, run_hidden, fault, path, list(overrides), initialize=False)
    return status


REFUSED = {
    "temperature": ("temperature", ["weight_sync.transport=disk"]),
    "permuted experts": ("wrong_weights", ["weight_sync.verify=none"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_run_that_would_be_silent_is_refused(
    server: SGLangServer, tmp_path: Path, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    cause, overrides = REFUSED[fault]
    assert run(server, tmp_path, fault, *overrides) == 1
    printed = capfd.readouterr()
    (error,) = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert "learning would be silent: E[phi] 0." in error and "preflight.force=true" in error
    folder = tmp_path / "runs" / "run"
    report = json.loads((folder / "preflight.json").read_text())
    assert [found["name"] for found in report["causes"]] == [cause], report
    assert report["causes"][0]["sentence"] in error
    assert report["verdict"] == "silent" and report["expected"]["length"] > 200
    assert (folder / "metrics.jsonl").read_text() == "", "not a step was made"
    if fault == "temperature":
        assert report["temperature_confirmed"] == pytest.approx(0.9, abs=0.005)
        assert "confirmed: at temperature 0.9 trainer and sampler agree" in error
        # What was predicted from single tokens is what these very responses show, as far as 16 of them can.
        assert report["observed"] == pytest.approx(
            (report["expected"]["weight_pos"] + report["expected"]["weight_neg"]) / 2, abs=0.2
        )


def test_a_forced_run_starts_and_the_panel_names_the_cause(
    server: SGLangServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(server, tmp_path, "temperature", SHORT, "preflight.min_phi=0.99", "preflight.force=true") == 0
    assert "the sampler's temperature is not the one" in capfd.readouterr().out
    (line,) = (tmp_path / "runs" / "run" / "health" / "warnings.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "mismatch" and "temperature 0.9" in json.loads(line)["text"]


def test_top_p_is_seen_though_the_server_does_not_tell(server: SGLangServer, tmp_path: Path) -> None:
    """SGLang reports log-probabilities from before top-p: no token differs, but the tail is never drawn."""
    # One minibatch, all of it fresh: tokens enough for the 6 standard errors that are asked not to be luck.
    assert run(server, tmp_path, "top-p", "rollout.max_new_tokens=240", "training.minibatches_per_step=1") == 0
    folder = tmp_path / "runs" / "run"
    report = json.loads((folder / "preflight.json").read_text())
    assert [found["name"] for found in report["causes"]] == ["truncated_sampling"]
    assert report["evidence"]["kl"] < 1e-8 and report["expected"]["weight_pos"] > 0.99
    (line,) = (folder / "health" / "warnings.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "truncated_sampling"


def test_only_the_pre_flight(server: SGLangServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(server, tmp_path, "none", SHORT, "--preflight-only") == 0
    printed = capfd.readouterr().out
    assert "pre-flight: 16 responses" in printed and "mean length" in printed and "likely cause" not in printed
    report = json.loads((tmp_path / "runs" / "run.preflight" / "preflight.json").read_text())
    assert report["verdict"] == "ok" and report["causes"] == [] and report["expected"]["weight_neg"] > 0.999
    assert not (tmp_path / "runs" / "run").exists(), "the run itself can still begin"
    assert run(server, tmp_path, "temperature", SHORT, "preflight.min_phi=0.99", "--preflight-only") == 1


def test_a_weight_that_is_always_one_refuses_nothing(server: SGLangServer, tmp_path: Path) -> None:
    assert run(server, tmp_path, "temperature", SHORT, "--preflight-only", "algorithm.kernel=reinforce") == 0
    report = json.loads((tmp_path / "runs" / "run.preflight" / "preflight.json").read_text())
    assert report["expected"]["weight_pos"] is None and report["expected"]["ess_w"] < 0.5
    assert [found["name"] for found in report["causes"]] == ["temperature"]


def test_the_training_stream_does_not_notice(server: SGLangServer, tmp_path: Path) -> None:
    prompts = {}
    for name in ("with", "without"):
        own = [f"run.name={name}", f"preflight.enabled={name == 'with'}", "rollout.max_new_tokens=8"]
        assert run(server, tmp_path, "none", *own, "rollout.save_batches=true", "logging.rollout_groups=9") == 0
        lines = (tmp_path / "runs" / name / "rollouts" / "step_000001.jsonl").read_text().splitlines()
        prompts[name] = [(json.loads(line)["sample"], json.loads(line)["prompt"]) for line in lines]
    assert prompts["with"] == prompts["without"]
    assert not (tmp_path / "runs" / "without" / "preflight.json").exists()


def test_a_hopeless_run_saves_and_ends_with_an_error(
    server: SGLangServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = ["rollout.max_new_tokens=24", "training.steps=9", "health.warn={faint: 2.0}", "health.stop_when={faint: 2}"]
    assert run(server, tmp_path, "none", *own) == 1
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "health.stop_when: vespo/phi_mean is" in error and "below 2" in error and "for 2 steps in a row" in error
    folder = tmp_path / "runs" / "run"
    assert read_metrics(folder / "metrics.jsonl").steps[-1] == 2
    assert [path.name for path in (folder / "checkpoints").glob("iter_*")] == ["iter_0000002"]


def test_the_panel_measures_what_the_loss_did(server: SGLangServer, tmp_path: Path) -> None:
    """Quantiles and staleness of a real run agree with what is known of it otherwise."""
    own = ["rollout.max_new_tokens=24", "training.steps=2", "training.minibatches_per_step=4"]
    assert run(server, tmp_path, "none", *own) == 0
    for values in read_metrics(tmp_path / "runs" / "run" / "metrics.jsonl").values[-2:]:
        assert values["health/kl_fresh"] < 1e-8 < values["health/kl_k3"]
        shares = [values[f"health/staleness_{name}_share"] for name in ("0", "1_3", "4_15", "16_63", "64_more")]
        assert np.sum(shares) == pytest.approx(1) and shares[0] == pytest.approx(0.25, abs=0.15) and shares[2] == 0
        assert values["health/log_w_p05"] <= values["health/log_w_p50"] <= values["health/log_w_p95"]
        assert abs(values["health/log_w_p95"]) <= values["vespo/log_w_abs_max"] + 1e-6
        assert values["health/samples_len64"] == 16
