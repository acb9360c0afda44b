import pytest

from megatron_vespo.train import all_overrides, make_parser


@pytest.mark.parametrize("value", ["auto", "never", "200"])
def test_resume_is_an_override_that_wins_wherever_it_stands(value: str) -> None:
    for words in (
        ["c.yaml", "--resume", value, "run.resume=7", "a.b=c"],
        ["--resume", value, "c.yaml", "run.resume=7", "a.b=c"],
        ["c.yaml", "run.resume=7", "a.b=c", "--resume", value],
    ):
        options = make_parser("x").parse_intermixed_args(words)
        assert options.config == "c.yaml"
        assert all_overrides(options) == ["run.resume=7", "a.b=c", f"run.resume={value}"]
    assert all_overrides(make_parser("x").parse_intermixed_args(["c.yaml"])) == []
