from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_vespo import launch, serve, train
from megatron_vespo.errors import UserError
from megatron_vespo.train import all_overrides, make_run_parser


@pytest.mark.parametrize("value", ["auto", "never", "200"])
def test_resume_is_an_override_that_wins_wherever_it_stands(value: str) -> None:
    for words in (
        ["c.yaml", "--resume", value, "run.resume=7", "a.b=c"],
        ["--resume", value, "c.yaml", "run.resume=7", "a.b=c"],
        ["c.yaml", "run.resume=7", "a.b=c", "--resume", value],
    ):
        options = make_run_parser("x", "").parse_intermixed_args(words)
        assert options.config == "c.yaml"
        assert all_overrides(options) == ["run.resume=7", "a.b=c", f"run.resume={value}"]
    assert all_overrides(make_run_parser("x", "").parse_intermixed_args(["c.yaml"])) == []


@pytest.mark.parametrize(
    "main, words",
    [
        (train.main, ["megatron_vespo.train", "Entry point of every rank", "--resume"]),
        (launch.main, ["megatron_vespo.launch", "One command on one node", "--ranks", "--dry-run", "--nodes"]),
        (serve.main, ["megatron_vespo.serve", "Only the SGLang servers", "--url-file"]),
    ],
)
def test_help_says_what_each_command_does(
    main: Callable[[list[str]], int], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and all(word in shown for word in [*words, "section.key=value", "servers_per_node"])


@pytest.mark.parametrize("rank, joined, told", [(0, False, True), (1, False, False), (1, True, True)])
def test_until_the_ranks_have_joined_the_first_of_a_node_tells_what_all_of_it_find(
    rank: int,
    joined: bool,
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rank 1 may be there before rank 0 has made the folder in which a run's first error is noted."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    config = SimpleNamespace(run_folder=tmp_path)  # as where the folder is still to be made
    log = SimpleNamespace(path=tmp_path / "rank.log" if joined else None)
    train._report(UserError("the plan does not fit"), config, log)
    assert capsys.readouterr().err == ("error: the plan does not fit\n" if told else "")
