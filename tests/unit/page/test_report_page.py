"""The page's content and its data's escaping; test_report_browser looks at it in a browser."""

import hashlib
import json
import re
import urllib.error
import urllib.request
from importlib.resources import files
from pathlib import Path
from threading import Thread

import pytest

from megatron_vespo.metrics.records import Records
from megatron_vespo.metrics.registry import metric
from megatron_vespo.page.charts import _PLAIN, MAX_POINTS, charts_of
from megatron_vespo.page.content import content_of, differences
from megatron_vespo.page.html import make_html, script_data
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
        texts = {"prompt": HOSTILE, "response": HOSTILE, "data_source": "ab"[step % 2]}
        line = {"step": step, "sample": "0/0", **texts, "reward": step / 10, "tokens": tokens}
        line["reward_terms"] = {"format": 0.25}
        tokens |= {"inserted_text": ["<", ">"], "inserted_before": [1, 1]}
        (folder / "rollouts" / f"step_{step:06d}.jsonl").write_text((json.dumps(line) + "\n") * samples)
    (folder / "evaluation").mkdir()
    for step, value in ((0, 0.25), (2, 0.75), (3, 0.5)):
        estimate = {"value": value, "low": value - 0.125, "high": value + 0.125}
        result = {"problems": 9, "samples_per_prompt": 4, "average": estimate, "passes": {"1": estimate, "4": estimate}}
        record = {"label": f"step_{step}", "step": step, "intervals": "by hand", "sets": {"heldout": result}}
        (folder / "evaluation" / f"step_{step:06d}.json").write_text(json.dumps(record))
    return folder


def test_charts_are_of_declared_metrics() -> None:
    for chart in _PLAIN:
        for name in (*chart.lines.values(), *(edge for band in chart.bands.values() for edge in band)):
            metric(name)


def test_long_curves_keep_their_spikes_and_those_of_their_bands() -> None:
    names = ("health/log_w_p50", "health/log_w_p05", "health/log_w_p95")
    rows = [dict(zip(names, (1.0, 0.5, 2.0), strict=True)) for _ in range(50_000)]
    rows[31_234][names[0]], rows[777][names[1]], rows[40_001][names[2]] = 5.0, -5.0, 9.0
    [chart] = charts_of([Records(list(range(50_000)), rows, [0.0] * 50_000, 0)])
    steps, *columns = chart["lines"][0]["points"]
    assert len(steps) <= MAX_POINTS
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 49_999)
    spikes = [steps[column.index(value)] for column, value in zip(columns, (5.0, -5.0, 9.0), strict=True)]
    assert spikes == [31_234, 777, 40_001]
    steps, means = chart["lines"][0]["means"]
    assert (len(steps), steps[-1]) == (MAX_POINTS // 2, 49_999)
    assert [mean for mean in means if mean != 1.0] == [1.04]  # a spike of 4 in a stretch of 100 steps


def test_data_cannot_end_its_script_element() -> None:
    text = script_data({"a": HOSTILE, "b": "\ud800"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text)["a"] == HOSTILE


def test_the_page_is_whole_and_hostile_text_stays_text(tmp_path: Path) -> None:
    page = make_html(content_of([make_run(tmp_path / "run")]))
    assert "<img src=x" not in page
    assert page.count("</script>") == 3
    assert "https://" not in page.replace("https://github.com/leeoniya/uPlot", "")


def test_the_plotting_library_is_what_its_authors_published_and_its_licence_goes_with_it(tmp_path: Path) -> None:
    static = files("megatron_vespo.page").joinpath("static")
    origin = static.joinpath("uPlot.ORIGIN").read_text()
    sums = dict(re.findall(r"^([0-9a-f]{64})  (\S+)$", origin, re.MULTILINE))
    assert set(sums.values()) == {"uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"}
    for digest, name in sums.items():
        assert hashlib.sha256(static.joinpath(name).read_bytes()).hexdigest() == digest
    assert "uPlot 1.6.32" in origin and "(v1.6.32)" in static.joinpath("uPlot.iife.min.js").read_text()[:100]
    licence = static.joinpath("uPlot.LICENSE").read_text()
    assert "MIT License" in licence and licence in make_html(content_of([make_run(tmp_path / "run")]))


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
