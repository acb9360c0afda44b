import json
from pathlib import Path
from typing import Any

import pytest

from examples.digits_cpu.task import write_model
from megatron_vespo.checks import check_config, check_inputs, describe_layout
from megatron_vespo.config import Config
from megatron_vespo.config_file import parse_config
from megatron_vespo.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A configuration that passes."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").touch()
    (tmp_path / "train.jsonl").write_text('{"prompt": "1"}\n')
    return {
        "run": {"name": "r", "folder": str(tmp_path / "runs")},
        "model": {"hf_path": str(model)},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 4},
        "training": {"steps": 1, "minibatches_per_step": 2},
    }


def refusal(config: Config, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        check_config(config, world_size)
    return str(caught.value)


def test_a_good_config_passes(tree: dict[str, Any]) -> None:
    check_config(parse_config(tree), 4)


def test_a_missing_checkpoint_is_named(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["model"]["hf_path"] = str(tmp_path / "nowhere")
    message = refusal(parse_config(tree))
    assert message.startswith("model.hf_path: ")
    assert "config.json not found" in message


def test_a_checkpoint_without_weights_must_be_asked_for(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "model.initialize=random" in refusal(parse_config(tree))
    tree["model"]["initialize"] = "random"
    check_config(parse_config(tree), 1)


def test_a_quantized_checkpoint_is_not_served(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model" / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    assert "is quantized" in refusal(parse_config(tree))
    check_config(parse_config(tree | {"objective": "sft"}), 1)


def test_a_layout_that_does_not_fit_names_the_field(tree: dict[str, Any]) -> None:
    tree["megatron"] = {"tensor_model_parallel_size": 2}
    message = refusal(parse_config(tree), 3)
    assert "tensor_model_parallel_size" in message
    assert "3 ranks" in message


def test_fewer_samples_than_replicas(tree: dict[str, Any]) -> None:
    message = refusal(parse_config(tree), 5)
    assert "training.minibatches_per_step = 4 samples are fewer than the 5 data-parallel ranks" in message
    tree |= {"objective": "sft"}
    tree["training"]["samples_per_step"] = 3
    assert "training.samples_per_step = 3 samples are fewer than the 4" in refusal(parse_config(tree), 4)


@pytest.mark.parametrize("field", ["data.train", "data.evaluation.held"])
def test_missing_and_empty_data_are_named(tree: dict[str, Any], tmp_path: Path, field: str) -> None:
    path = tmp_path / "data.jsonl"
    if field == "data.train":
        tree["data"]["train"] = str(path)
    else:
        tree["data"]["evaluation"] = {"held": str(path)}
    assert refusal(parse_config(tree)) == f"{field}: {path} not found"
    path.touch()
    assert refusal(parse_config(tree)).startswith(f"{field}: {path} is empty")


def test_an_unknown_server_argument_is_found_early(tree: dict[str, Any]) -> None:
    tree["sglang"] = {"max_total_tokenz": 1}
    assert "max_total_tokens" in refusal(parse_config(tree))


def test_a_missing_key_is_found_early(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    tree["rollout"]["server"] = {"url": "http://node7:30000", "api_key_env": "MY_KEY"}
    assert "environment variable MY_KEY is not set" in refusal(parse_config(tree))
    check_config(parse_config(tree | {"objective": "sft"}), 1)


def test_rollouts_alone_run_on_one_rank_whatever_the_trainers_layout(tree: dict[str, Any]) -> None:
    tree |= {"objective": "rollout", "megatron": {"expert_model_parallel_size": 2}}
    check_config(parse_config(tree), 1)
    assert "runs on one rank, not on 2" in refusal(parse_config(tree), 2)
    assert describe_layout(parse_config(tree), 1) == "1 rank, no trainer"
    tree["sglang"] = {"max_total_tokenz": 1}
    assert "max_total_tokens" in refusal(parse_config(tree))


def test_a_replay_needs_a_batch_for_every_step(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    tree["rollout"]["replay"] = str(folder)
    tree["training"]["steps"] = 3
    assert f"rollout.replay: {folder} holds 0 saved rollout batches" in refusal(parse_config(tree))
    folder.mkdir()
    for name in ("batch_000001.msgpack", "batch_000007.msgpack", "step_000001.jsonl"):
        (folder / name).touch()
    message = refusal(parse_config(tree))
    assert "holds 2 saved rollout batches" in message and "training.steps=3" in message
    tree["training"]["steps"] = 2
    check_config(parse_config(tree), 1)


def test_a_replay_needs_neither_data_nor_server(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "batch_000001.msgpack").touch()
    tree["rollout"]["replay"] = str(tmp_path)
    tree |= {"data": {"evaluation": {"held": "/no/such/file"}}, "sglang": {"no_such_argument": 1}}
    check_config(parse_config(tree), 1)


def test_a_run_does_not_replay_what_it_is_about_to_delete(tree: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "r" / "rollouts"
    folder.mkdir(parents=True)
    (folder / "batch_000001.msgpack").touch()
    tree["run"]["overwrite"] = True
    (tmp_path / "link").symlink_to(folder)
    tree["rollout"]["replay"] = str(tmp_path / "link")
    assert "lies in this run's own folder" in refusal(parse_config(tree))
    tree["run"]["name"] = "r2"
    check_config(parse_config(tree), 1)


def test_rollouts_alone_are_not_resumed(tree: dict[str, Any]) -> None:
    tree |= {"objective": "rollout"}
    tree["run"]["resume"] = "auto"
    assert "run.resume: objective rollout saves no checkpoints" in refusal(parse_config(tree))


def test_the_layout_in_words(tree: dict[str, Any]) -> None:
    assert describe_layout(parse_config(tree), 1) == "1 rank, TP1 PP1 EP1 DP1"
    tree["megatron"] = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}
    assert describe_layout(parse_config(tree), 4) == "4 ranks, TP2 PP1 EP4 DP2"


@pytest.mark.parametrize(
    "health", [{"warn": {"silence": 0.1}}, {"stop_when": ["silence"]}, {"stop_when": {"silence": 3}}]
)
def test_an_unknown_health_condition_is_found_early(tree: dict[str, Any], health: dict[str, Any]) -> None:
    message = refusal(parse_config(tree | {"health": health}))
    assert message.startswith(f"health.{next(iter(health))}: unknown condition 'silence'; did you mean 'silent'?")


def test_a_pre_flight_alone_has_a_folder_of_its_own_and_needs_a_server(tree: dict[str, Any]) -> None:
    assert parse_config(tree | {"preflight": {"only": True}}).run_folder.name == "r.preflight"
    with pytest.raises(UserError, match=r"preflight.only: there is no pre-flight without a trainer and a server"):
        parse_config(tree | {"preflight": {"only": True}, "objective": "sft"})


SHARED = {"placement": {"mode": "colocate"}}
FP8 = {"sglang": {"quantization": "fp8"}}


@pytest.mark.parametrize(
    "changes, named",
    [
        (SHARED | {"rollout": {"max_staleness": 1}}, "rollout.max_staleness"),
        (SHARED | {"rollout": {"server": {"url": "http://a:1"}}}, "rollout.server"),
        (SHARED | {"rollout": {"server": {"router": "http://a:1"}}}, "rollout.server"),
        (SHARED | {"weight_sync": {"transport": "broadcast"}}, "weight_sync.transport"),
        (SHARED | {"weight_sync": {"transport": "delta"}}, "weight_sync.transport"),
        (SHARED | {"weight_sync": {"pause": "in_place"}}, "weight_sync.pause"),
        ({"weight_sync": {"transport": "tensor"}}, "weight_sync.transport=tensor"),
        (
            FP8 | {"rollout": {"server": {"url": "http://a:1"}}, "weight_sync": {"verify": "none"}},
            "sglang.quantization=fp8",
        ),
        (FP8 | {"weight_sync": {"transport": "delta"}}, "sglang.quantization=fp8"),
        (FP8 | {"weight_sync": {"transport": "disk"}}, "sglang.quantization=fp8"),
    ],
)
def test_pushes_that_cannot_work_are_refused(tree: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    for section, fields in changes.items():
        tree[section] = tree.get(section, {}) | fields
    message = refusal(parse_config(tree))
    assert named in message and ("placement.mode" in message or "leave" in message)


@pytest.mark.parametrize(
    "changes, transport",
    [
        ({}, "broadcast"),
        (SHARED, "tensor"),
        (SHARED | {"weight_sync": {"transport": "disk"}}, "disk"),
        (SHARED | FP8, "tensor"),
        (FP8, "broadcast"),
    ],
)
def test_the_transport_follows_the_placement(tree: dict[str, Any], changes: dict[str, Any], transport: str) -> None:
    config = parse_config(tree | changes)
    check_config(config, 1)
    assert config.transport == transport


def test_where_nothing_is_pushed_the_placement_says_nothing(tree: dict[str, Any]) -> None:
    for objective in ("sft", "rollout"):
        config = parse_config(tree | SHARED | FP8 | {"objective": objective})
        check_config(config, 1)
        assert not config.shares_devices and not config.quantises_pushes


@pytest.fixture
def inputs(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A configuration with functions of its user's own and a tokenizer; importing the functions would fail."""
    write_model(tmp_path / "model")
    code = "import no_such_package\nif True:\n    async def turns(conversation, prompt): ...\nscore = len\n"
    (tmp_path / "mine.py").write_text(code)
    tree["reward"] = {"function": f"{tmp_path}/mine.py:score"}
    tree["rollout"]["generate"] = f"{tmp_path}/mine.py:turns"
    tree["data"]["evaluation"] = {"held": str(tmp_path / "train.jsonl")}
    return tree


def test_what_is_the_users_own_is_looked_at_without_running_it(inputs: dict[str, Any]) -> None:
    check_inputs(parse_config(inputs))
    inputs["reward"] = {"terms": [{"function": "math"}, {"function": "package.module:function"}]}
    check_inputs(parse_config(inputs))


@pytest.mark.parametrize(
    "section, wrong, said",
    [
        ("reward", {"function": "{}/mine.py:scores"}, "mine.py has no 'scores'"),
        ("reward", {"function": "{}/theirs.py:score"}, "theirs.py does not exist"),
        ("reward", {"function": "exact_mach"}, "unknown reward 'exact_mach'"),
        ("reward", {"terms": [{"function": "math"}, {"function": "{}/mine.py:no"}]}, "mine.py has no 'no'"),
        ("rollout", {"generate": "{}/mine.py:turn"}, "rollout.generate .* has no 'turn'"),
        ("rollout", {"generate": "{}/broken.py:turn"}, "broken.py:2: not valid Python"),
        ("data", {"train": {"function": "{}/mine.py:rows"}}, "mine.py has no 'rows'"),
        ("data", {"evaluation": {"held": "{}/other.jsonl"}}, "other.jsonl:1: no 'prompt'; the line has question"),
        ("data", {"train": "{}/other.jsonl", "keys": {"prompt": "text"}}, "other.jsonl:1: no 'text', which data.keys"),
    ],
)
def test_what_is_the_users_own_is_found_wrong_early(
    inputs: dict[str, Any], tmp_path: Path, section: str, wrong: dict[str, Any], said: str
) -> None:
    (tmp_path / "broken.py").write_text("x = 1\ndef turn(:\n")
    (tmp_path / "other.jsonl").write_text('{"question": "1"}\n')
    own = json.loads(json.dumps(wrong).replace("{}/", f"{tmp_path}/"))
    inputs[section] = {**inputs[section], **own} if section != "reward" else own
    with pytest.raises(UserError, match=said):
        check_inputs(parse_config(inputs))


def test_supervised_rows_are_looked_at_as_such(inputs: dict[str, Any], tmp_path: Path) -> None:
    inputs |= {"objective": "sft"}
    with pytest.raises(UserError, match=r"train\.jsonl:1"):
        check_inputs(parse_config(inputs))
    (tmp_path / "train.jsonl").write_text('{"prompt": "1", "response": "2"}\n')
    inputs["reward"] = {"function": "unknown"}  # nothing is scored
    check_inputs(parse_config(inputs))


def test_training_data_is_of_no_matter_to_an_evaluation(inputs: dict[str, Any], tmp_path: Path) -> None:
    inputs["data"]["train"] = str(tmp_path / "other.jsonl")
    (tmp_path / "other.jsonl").write_text('{"question": "1"}\n')
    check_inputs(parse_config(inputs), only_evaluates=True)
    inputs["data"]["evaluation"] = {"held": inputs["data"]["train"]}
    with pytest.raises(UserError, match=r"other\.jsonl:1: no 'prompt'"):
        check_inputs(parse_config(inputs), only_evaluates=True)
