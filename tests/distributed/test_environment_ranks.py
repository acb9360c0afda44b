"""The checks across ranks, on gloo ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vespo import parallel
from megatron_vespo.config_file import parse_config
from megatron_vespo.environment import cuda, ranks
from megatron_vespo.environment.ranks import RankFacts
from megatron_vespo.errors import UserError
from megatron_vespo.gpus import Gpus
from tests.ranks import run_ranks

CONFIG: dict[str, Any] = {
    "run": {"name": "r"},
    "model": {"hf_path": "m"},
    "data": {"train": "t.jsonl"},
    "training": {"steps": 1},
}


def outcome(tree: dict[str, Any], warnings: list[str], nodes: int = 1, clock: Callable[[], float] = time.time) -> str:
    os.environ["LOCAL_WORLD_SIZE"], os.environ["GROUP_WORLD_SIZE"] = str(parallel.world_size() // nodes), str(nodes)
    try:
        ranks.check_ranks(parse_config(tree), warnings, clock)
    except UserError as error:
        return str(error)
    return ""


def _agree() -> tuple[str, float]:
    began = time.process_time()  # on a busy machine the others' work would count too
    told = outcome(CONFIG, [])
    return told, time.process_time() - began


def test_ranks_that_agree_are_let_go_at_once() -> None:
    results = run_ranks(2, _agree)
    assert [told for told, _ in results] == ["", ""]
    assert all(seconds < 0.2 for _, seconds in results), results


def _other_config() -> str:
    return outcome(CONFIG | {"training": {"steps": 1 + parallel.rank()}}, [])


def test_another_configuration_is_named_on_every_rank() -> None:
    first, second = run_ranks(2, _other_config)
    assert first == second and first.startswith("configuration: ") and "on rank 1, " in first
    assert "give every node the same file" in first


def _broken_te() -> str:
    return outcome(CONFIG | {"model": {"hf_path": "m", "layer_spec": "transformer_engine"}}, [])


def test_a_package_that_cannot_be_imported_says_why() -> None:
    for told in run_ranks(2, _broken_te):
        assert "transformer_engine cannot be imported on ranks 0, 1" in told and "No module named" in told


def _slow_clock(seconds: float) -> list[float]:
    return ranks.measure_clocks(lambda: time.time() + seconds * (parallel.rank() == 1))


@pytest.mark.parametrize("seconds", [0.0, 30.0, 90.0])
def test_the_skew_of_clocks_is_measured(seconds: float) -> None:
    results = run_ranks(2, _slow_clock, seconds)
    assert results[0] == results[1]
    assert results[0][1] - results[0][0] == pytest.approx(seconds, abs=0.5)


def _wrong_clock() -> str:
    def clock() -> float:
        return time.time() + 90 * parallel.rank()

    return outcome(CONFIG, [], 2, clock) + "|" + outcome(CONFIG, [], 1, clock)


def test_clocks_are_compared_where_there_are_several_nodes() -> None:
    for told in run_ranks(2, _wrong_clock):
        several, one = told.split("|")
        assert "(rank 1) is 90.0 s ahead" in several and not one


def _warned() -> str:
    return outcome(CONFIG, ["the disk is small"], nodes=2)


def test_a_warning_of_all_nodes_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks(2, _warned) == ["", ""]
    assert capfd.readouterr().err.count("the disk is small") == 1


SAME = RankFacts(host="a", versions={"torch": "2.14.1", "device": "H100"}, settings={"NCCL_ALGO": "Ring"})


def found(name: str, *everyone: RankFacts) -> str | None:
    return next(check for check in ranks.CHECKS if check.name == name).find(everyone)


def test_ranks_that_differ_are_named() -> None:
    other = replace(SAME, host="b", versions={"torch": "2.11.0", "device": "H200"}, settings={})
    assert found("torch", SAME, SAME, SAME) is None
    assert found("torch", SAME, other, SAME, other, SAME) == "torch: 2.11.0 on ranks 1, 3, 2.14.1 on the others"
    assert found("device", SAME, SAME, other) == "device: H200 on rank 2, H100 on the others"
    assert found("settings", SAME, SAME, other) == "NCCL_ALGO: not set on rank 2, Ring on the others"
    assert found("transformer-engine", SAME, other) is None
    many = found("torch", *[SAME] * 50, *[other] * 40)
    assert many is not None and "and 24 more" in many and "ranks 50, 51" in many


def test_a_skew_is_judged_by_its_size() -> None:
    assert ranks.clock_findings(["a", "b"], [10.0, 10.9]) == []
    [(severity, message)] = ranks.clock_findings(["a", "b", "c"], [100.0, 98.0, 101.5])
    assert severity == "warning" and message.startswith("the clock of c (rank 2) is 3.5 s ahead of that of b (rank 1)")
    [(severity, _)] = ranks.clock_findings(["a", "b"], [0.0, 61.0])
    assert severity == "error"


def test_warnings_of_nodes_carry_their_names() -> None:
    everyone = [replace(SAME, warnings=["x"]), replace(SAME, host="b", warnings=["x", "y"])]
    assert ranks._by_host(everyone) == ["a, b: x", "b: y"]
    assert ranks._by_host(everyone[:1]) == ["x"]


def test_other_sources_have_another_digest(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    first = ranks.package_digest(tmp_path)
    (tmp_path / "b.txt").write_text("1")
    assert ranks.package_digest(tmp_path) == first
    (tmp_path / "a.py").write_text("2")
    assert ranks.package_digest(tmp_path) != first


def test_gpus_that_torch_cannot_use_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.check_torch()  # nothing to say here
    monkeypatch.setattr(cuda, "read_gpus", lambda visible: Gpus(8))
    with pytest.raises(UserError, match="cannot use the 8 GPUs that the driver shows: "):
        cuda.check_torch()
