import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from megatron_vespo.config import Config
from megatron_vespo.config.describe import describe_config
from megatron_vespo.config_file import dump_config, load_config, parse_config
from megatron_vespo.errors import UserError

ROOT = Path(__file__).parents[2]
MINIMAL = {
    "run": {"name": "r"},
    "model": {"hf_path": "m"},
    "data": {"train": "t.jsonl"},
    "training": {"steps": 2},
}


def config_file(folder: Path, text: str = "") -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + text)
    return path


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(MINIMAL | tree)
    return str(caught.value)


def test_a_minimal_config_has_the_documented_defaults() -> None:
    config = parse_config(MINIMAL)
    assert config.objective == "rl"
    assert config.algorithm.kernel == "vespo"
    assert config.rollout.behavior_logprobs == "rollout"
    assert config.rollout.max_staleness == 0
    assert config.run_folder == Path("runs/r")


@pytest.mark.parametrize(
    "tree, key, near",
    [
        ({"rolout": {}}, "rolout", "rollout"),
        ({"rollout": {"temprature": 1.0}}, "rollout.temprature", "temperature"),
        ({"rollout": {"server": {"prot": 1}}}, "rollout.server.prot", "port"),
        ({"megatron": {"tensor_model_parallel": 2}}, "megatron.tensor_model_parallel", "tensor_model_parallel_size"),
        ({"megatron": {"clip_gard": 1.0}}, "megatron.clip_gard", "clip_grad"),
        ({"megatron": {"overlap_grad_reduced": True}}, "megatron.overlap_grad_reduced", "overlap_grad_reduce"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(tree: dict[str, Any], key: str, near: str) -> None:
    message = refusal(tree)
    assert f"{key}: unknown key; did you mean '{near}'?" in message


def test_an_unknown_key_unlike_all_others_gets_no_guess() -> None:
    assert "xyzzy: unknown key" in refusal({"xyzzy": 1})
    assert "did you mean" not in refusal({"xyzzy": 1})


@pytest.mark.parametrize(
    "tree, key",
    [
        ({"training": {"steps": "many"}}, "training.steps"),
        ({"training": {"steps": 2.0}}, "training.steps"),
        ({"training": {"steps": 0}}, "training.steps"),
        ({"training": {"steps": True}}, "training.steps"),
        ({"run": {"name": 3}}, "run.name"),
        ({"run": {"name": ""}}, "run.name"),
        ({"rollout": {"temperature": 0.0}}, "rollout.temperature"),
        ({"rollout": {"stop_token_ids": [1, "2"]}}, "rollout.stop_token_ids.1"),
        ({"rollout": {"behavior_logprobs": "neither"}}, "rollout.behavior_logprobs"),
        ({"rollout": {"server": {"port": 70000}}}, "rollout.server.port"),
        ({"data": {"train": "t", "evaluation": {"a": 1}}}, "data.evaluation.a"),
        ({"algorithm": {"kernel_params": {"c1_pos": "2"}}}, "algorithm.kernel_params.c1_pos"),
        ({"megatron": [1]}, "megatron"),
        ({"run": None}, "run"),
    ],
)
def test_a_wrong_value_is_named(tree: dict[str, Any], key: str) -> None:
    assert f"config: {key}: " in refusal(tree)


def test_every_error_is_reported_at_once() -> None:
    message = refusal({"rolout": {}, "training": {"steps": "x"}, "model": {}})
    for key in ("rolout: unknown", "training.steps: ", "model.hf_path: missing"):
        assert key in message


def test_missing_training_data_is_named() -> None:
    assert "data.train: missing" in refusal({"data": {}})


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-3", ".001", "10e-4"])
def test_scientific_notation_is_a_float(tmp_path: Path, text: str) -> None:
    config = load_config(config_file(tmp_path, f"megatron: {{lr: {text}}}\n"))
    assert config.megatron["lr"] == pytest.approx(1e-3)
    assert isinstance(config.megatron["lr"], float)
    assert load_config(config_file(tmp_path), [f"megatron.lr={text}"]).megatron == config.megatron


@pytest.mark.parametrize("text, value", [("4", 4), ("-4", -4), ("'1e-3'", "1e-3"), ("1e3x", "1e3x"), ("true", True)])
def test_other_scalars_keep_their_type(tmp_path: Path, text: str, value: Any) -> None:
    read = load_config(config_file(tmp_path), [f"sglang.some_argument={text}"]).sglang["some_argument"]
    assert read == value
    assert type(read) is type(value)


def test_overrides_reach_nested_new_and_list_values(tmp_path: Path) -> None:
    config = load_config(
        config_file(tmp_path),
        [
            "run.name=other=name",
            "rollout.server.port=80",
            "rollout.stop_token_ids=[1, 2]",
            "data.evaluation.a=x.jsonl",
            "training.steps=5",
            "training.steps=6",
        ],
    )
    assert config.run.name == "other=name"
    assert config.rollout.server.port == 80
    assert config.rollout.stop_token_ids == [1, 2]
    assert config.data.evaluation == {"a": "x.jsonl"}
    assert config.training.steps == 6, "the last override wins"


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.steps", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("run.name.first=x", "'name' is a value, not a section"),
        ("training.steps=[1", "not valid YAML"),
        ("training.stpes=1", "did you mean 'steps'"),
    ],
)
def test_a_malformed_override_is_an_error(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", "\\[")) as caught:
        load_config(config_file(tmp_path), [override])
    if "did you mean" not in message:
        assert override in str(caught.value)


def test_bad_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        load_config(tmp_path / "missing.yaml")
    for text, message in (("a: [", "not valid YAML"), ("- 1", "expected a mapping"), ("", "expected a mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            load_config(tmp_path / "bad.yaml")


@pytest.mark.parametrize("objective", ["sft", "rollout"])
def test_only_reinforcement_learning_replays(objective: str) -> None:
    replay = {"rollout": {"replay": "runs/r/rollouts"}}
    assert f"rollout.replay: batches are trained on, which objective {objective}" in refusal(
        replay | {"objective": objective}
    )
    config = parse_config(MINIMAL | replay | {"data": {}})
    assert not config.samples_from_server


@pytest.mark.parametrize("objective, samples", [("rl", True), ("sft", False), ("rollout", True)])
def test_what_samples_from_a_server(objective: str, samples: bool) -> None:
    assert parse_config(MINIMAL | {"objective": objective}).samples_from_server is samples
    assert "data.train: missing" in refusal({"objective": objective, "data": {}})


def test_an_objective_that_is_none_of_ours_is_named() -> None:
    assert "config: objective: " in refusal({"objective": "rollouts"})


def test_minibatches_must_divide_the_samples_of_a_step() -> None:
    rollout = {"prompts_per_step": 3, "samples_per_prompt": 4}
    message = refusal({"rollout": rollout, "training": {"steps": 1, "minibatches_per_step": 5}})
    assert "training.minibatches_per_step=5 does not divide the 12 samples" in message
    parse_config(MINIMAL | {"rollout": rollout, "training": {"steps": 1, "minibatches_per_step": 6}})
    for objective in ("sft", "rollout"):
        other = {"objective": objective, "rollout": rollout, "training": {"steps": 1, "minibatches_per_step": 5}}
        parse_config(MINIMAL | other)


def test_dumping_and_loading_gives_the_same_config(tmp_path: Path) -> None:
    config = parse_config(
        MINIMAL
        | {
            "megatron": {"lr": 1e-05, "bf16": True, "fp8": "e4m3", "tensor_model_parallel_size": 2},
            "sglang": {"log_level": "error", "mem_fraction_static": 0.5},
            "rollout": {"stop_token_ids": [1, 2], "server": {"url": "http://h:1", "port": None}},
            "algorithm": {"kernel_params": {"c1_pos": 2.5, "log_w_limit": 1e1}},
            "data": {"train": "t", "evaluation": {"a": "b.jsonl"}},
        }
    )
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert type(load_config(path).megatron["lr"]) is float


def every_field(section: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += every_field(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
            assert field.description, f"{prefix}{name} has no docstring"
    return names


def test_the_help_describes_every_field() -> None:
    described = describe_config()
    keys = {line.split("  (")[0].split(":  ")[0].strip() for line in described.splitlines()}
    names = every_field(Config)
    assert len(names) > 50
    assert set(names) <= keys


def test_the_config_is_read_without_torch() -> None:
    code = "import sys, megatron_vespo.config, megatron_vespo.checks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Read elsewhere: the laboratory's files are grids of many runs, Kubernetes' are not ours.
OTHERS = {path for folder in ("staleness_lab", "kubernetes") for path in ROOT.glob(f"examples/{folder}/*.yaml")}
EXAMPLES = sorted(set(ROOT.glob("examples/**/*.yaml")) - OTHERS)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_is_a_valid_config(path: Path) -> None:
    assert load_config(path).training.steps > 0
