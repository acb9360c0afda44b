"""The page's content and its data's escaping; tests/page looks at it in a browser."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread

import pytest

from megatron_vespo.metrics.registry import metric
from megatron_vespo.page.charts import _PLAIN, MAX_POINTS, thin_out
from megatron_vespo.page.content import content_of, differences
from megatron_vespo.page.html import make_html, script_data
from megatron_vespo.page.run import MAX_SAMPLES
from megatron_vespo.page.serve import make_server
from megatron_vespo.report import main

HOSTILE = "</script><img src=x onerror=alert(1)><!-- \u2028 $data ${style}"


def make_run(folder: Path, steps: int = 3, samples: int = 2) -> Path:
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text("training: {steps: 9}\nrun: {name: x}\n")
    rows = [
        {"step": s, "rollout/reward_mean": s / 9, "perf/step_time": 2, "perf/train_time": 1}
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(1, steps + 1):
        tokens = {"text": [HOSTILE, "b"], "log_mu": [-1.0, -2.0], "log_pi": [-0.5, None], "version": [0, 1]}
        line = {
            "step": step,
            "sample": "0/0",
            "prompt": HOSTILE,
            "response": HOSTILE,
            "reward": step / 10,
            "tokens": tokens,
        }
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text((json.dumps(line) + "\n") * samples)
    return folder


def test_charts_are_of_declared_metrics() -> None:
    for chart in _PLAIN:
        for name in chart.lines.values():
            metric(name)


def test_long_curves_keep_their_spikes() -> None:
    values = [0.0] * 50_000
    values[31_234], values[777] = 5.0, -5.0
    steps, thin = thin_out(list(range(50_000)), values)
    assert len(steps) <= MAX_POINTS
    assert (steps[thin.index(5.0)], steps[thin.index(-5.0)]) == (31_234, 777)
    assert steps == sorted(set(steps))


def test_data_cannot_end_its_script_element() -> None:
    text = script_data({"a": HOSTILE, "b": "\ud800"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text)["a"] == HOSTILE


def test_the_page_is_whole_and_hostile_text_stays_text(tmp_path: Path) -> None:
    page = make_html(content_of([make_run(tmp_path / "run")]))
    assert "<img src=x" not in page
    assert page.count("</script>") == 3
    assert "https://" not in page.replace("https://github.com/leeoniya/uPlot", "")


def test_samples_are_capped_and_counted(tmp_path: Path) -> None:
    content = content_of([make_run(tmp_path / "run", steps=3, samples=MAX_SAMPLES)])
    assert len(content["samples"]) == MAX_SAMPLES
    assert content["left_out"] == 2 * MAX_SAMPLES
    assert {sample["step"] for sample in content["samples"]} == {1, 2, 3}


def test_differences_of_settings() -> None:
    assert differences([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}]) == [
        {"key": "b", "values": ["2", "3"]},
        {"key": "c", "values": [None, "4"]},
    ]


def test_what_is_missing_or_half_written_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rollout/rew')
    (run / "config.yaml").write_text("run: {name: [")
    (run / "rollouts" / "step_000002.jsonl").write_text('{"step": 2, "sam')
    (run / "logs").mkdir()
    (run / "logs" / "error.txt").write_text("error: the disk is full")
    notes = " ".join(content_of([run])["runs"][0]["notes"])
    for part in ("metrics.jsonl: 1 unreadable", "config.yaml", "step_000002.jsonl: 1 unreadable", "the disk is full"):
        assert part in notes
    (run / "metrics.jsonl").unlink()
    assert "no metrics.jsonl yet" in " ".join(content_of([run])["runs"][0]["notes"])


def test_what_is_no_run_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 1
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("error: ") == 2


def test_the_file_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    assert main([str(run)]) == 0
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert str(run / "report.html") in capsys.readouterr().out


def test_only_the_page_and_its_data_are_served(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with make_server([run], 0, 5.0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(base + "/content.json") as answer:
            assert json.load(answer)["runs"][0]["done"] == 3
        with urllib.request.urlopen(base + "/") as answer:
            assert b'"refresh":5.0' in answer.read()
        for path in ("/config.yaml", "/../run/config.yaml", "/rollouts/", "/?x"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(base + path)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(base + "/", headers={"Host": "evil.example"}))
        server.shutdown()
