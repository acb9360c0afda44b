import json
import sys
from pathlib import Path

import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.rollout import server_args
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.rollout.server_args import build_command, build_environment, validate_server_args


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3MoeForCausalLM"]}))
    return tmp_path


def test_arguments_keep_their_names(model: Path) -> None:
    args = {"disable_radix_cache": True, "enable_lora": False, "cuda_graph_bs_decode": [1, 2], "dtype": "bfloat16"}
    command = " ".join(build_command("python", model, "cpu", "127.0.0.1", 30000, 7, args))
    assert command.startswith(f"python -m sglang.launch_server --model-path {model} --device cpu")
    assert "--disable-radix-cache" in command and "--enable-lora" not in command
    assert "--cuda-graph-bs-decode 1 2" in command and "--dtype bfloat16" in command and "float32" not in command
    assert "--log-level-http warning" in command
    assert "--random-seed 7" in command and "--max-total-tokens 65536" in command
    command = " ".join(build_command("python", model, "cuda", "127.0.0.1", 30000, 7, {}))
    assert "torch_native" not in command and "--log-level-http warning" in command


def test_the_environment(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("RANK", "3")
    environment = build_environment(model, "cpu", {"OMP_NUM_THREADS": "2"})
    assert "PYTHONDONTWRITEBYTECODE" not in environment and "RANK" not in environment
    assert environment["SGLANG_PLATFORM"] == "megatron_vespo_cpu" and environment["OMP_NUM_THREADS"] == "2"
    assert environment["SGLANG_EXTERNAL_MODEL_PACKAGE"] == "megatron_vespo.sglang_cpu.models"
    assert "SGLANG_PLATFORM" not in build_environment(model, "cuda", {})
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE" not in build_environment(model, "cpu", {})


def test_unknown_and_reserved_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_args, "known_server_args", lambda: {"max_total_tokens", "dtype"})
    validate_server_args({"dtype": "float32"})
    with pytest.raises(UserError, match=r"^sglang.max_totl_tokens: .*did you mean sglang.max_total_tokens\?"):
        validate_server_args({"max_totl_tokens": 1})
    with pytest.raises(UserError, match=r"^sglang.port: leave it out"):
        validate_server_args({"port": 1})
    monkeypatch.setattr(server_args, "known_server_args", lambda: None)
    validate_server_args({"not_checked_without_sglang": 1})


def test_the_names_are_read_from_the_installed_source() -> None:
    known = server_args.known_server_args()
    if known is None:
        pytest.skip("SGLang is not installed here")
    some = {"tp_size", "tensor_parallel_size", "mem_fraction_static", "disable_cuda_graph", "config"}
    assert some | set(server_args.SERVER_DEFAULTS | server_args.CPU_DEFAULTS) <= known
    assert "sglang.srt.server_args" not in sys.modules


def test_a_device_or_a_model_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tpu' is not one of cpu, cuda"):
        SGLangServer(tmp_path, tmp_path / "log", device="tpu")
    with pytest.raises(UserError, match=r"no config\.json"):
        SGLangServer(tmp_path, tmp_path / "log")
