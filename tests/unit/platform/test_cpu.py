import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vespo import platform
from megatron_vespo.platform import cpu
from tests.hf_reference import hf_log_probs, log_probs_in_this_process
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3


def megatron(name: str) -> types.ModuleType:
    """A module of megatron.core; tests.ranks has prepared this process for its import."""
    return importlib.import_module(f"megatron.core.{name}")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_torch_itself_is_unchanged() -> None:
    assert not torch.cuda.is_available()
    ours = [
        f"{owner.__name__}.{name}"
        for owner in (torch, torch.cuda, torch.cuda.random, torch.distributed, torch.nn.functional, torch.Tensor)
        for name, value in vars(owner).items()
        if str(getattr(value, "__module__", "")).startswith("megatron")
    ]
    assert sorted(ours) == ["Tensor.cuda", "Tensor.type"]
    for name in cpu._FACTORIES:
        assert type(getattr(torch, name)).__name__ == "builtin_function_or_method", name
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()
    assert not any(key is None for key in getattr(torch.cuda, "default_generators", ()))


def test_megatron_modules_see_the_cpu() -> None:
    seen = megatron("parallel_state").torch
    for name in ("tensor_parallel.random", "transformer.moe.token_dispatcher", "optimizer.distrib_optimizer"):
        assert megatron(name).torch is seen
    assert seen is not torch
    assert seen.Tensor is torch.Tensor
    assert seen.float32 is torch.float32
    assert seen.zeros(2, device="cuda").device.type == "cpu"
    assert seen.arange(3, device=torch.device("cuda", 0), pin_memory=True).tolist() == [0, 1, 2]
    assert seen.empty_like(torch.ones(2), device="cuda:1").device.type == "cpu"
    assert seen.cuda.current_device() == torch.device("cpu")
    assert not seen.cuda.is_available()
    seen.cuda.Stream().wait_stream(seen.cuda.current_stream())
    with seen.cuda.stream(seen.cuda.Stream()):
        seen.cuda.synchronize()


def test_names_that_torch_gets_later_are_found() -> None:
    torch.made_up_later = 7  # type: ignore[attr-defined]
    try:
        assert megatron("parallel_state").torch.made_up_later == 7
    finally:
        del torch.made_up_later  # type: ignore[attr-defined]


def called_in_megatron(expression: str, tensor: torch.Tensor) -> object:
    """The expression as a function of a megatron.core module would evaluate it."""
    return eval(f"(lambda: {expression})()", {"__name__": "megatron.core.optimizer.made_up", "tensor": tensor})


def test_tensor_methods_answer_differently_to_megatron_alone() -> None:
    tensor = torch.ones(2)
    assert tensor.type() == "torch.FloatTensor"
    assert tensor.type(torch.float64).dtype == torch.float64
    assert called_in_megatron("tensor.type()", tensor) == "torch.cuda.FloatTensor"
    assert called_in_megatron("tensor.type()", tensor.bfloat16()) == "torch.cuda.BFloat16Tensor"
    assert called_in_megatron("tensor.type()", tensor.long()) == "torch.LongTensor"
    assert called_in_megatron("tensor.type('torch.DoubleTensor').dtype", tensor) == torch.float64
    assert called_in_megatron("tensor.cuda()", tensor) is tensor
    with pytest.raises((RuntimeError, AssertionError)):
        tensor.cuda()


def test_preparing_again_changes_nothing() -> None:
    before = list(sys.meta_path), torch.Tensor.type
    platform.prepare()
    assert (list(sys.meta_path), torch.Tensor.type) == before


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if not isinstance(finder, cpu._Hook)])


@pytest.mark.usefixtures("not_installed")
def test_installing_after_megatron_was_imported_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"megatron\.core was imported before"):
        cpu.install()


@pytest.mark.usefixtures("not_installed")
def test_nothing_changes_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delitem(sys.modules, "megatron.core")  # as before the first import of it
    before = list(sys.meta_path), torch.Tensor.type, torch.Tensor.cuda
    platform.prepare()
    assert (list(sys.meta_path), torch.Tensor.type, torch.Tensor.cuda) == before
    with pytest.raises(RuntimeError, match="with CUDA"):
        cpu.install()


def test_hugging_face_models_in_this_process_are_right(tmp_path: Path) -> None:
    folder = make_tiny_qwen3(tmp_path / "model")
    sequences = [[3, 5, 7, 11, 13, 17, 19, 23], [2]]
    here = log_probs_in_this_process(folder, sequences)
    elsewhere = hf_log_probs([folder], sequences, tmp_path / "scratch")["model"]
    for one, other in zip(here, elsewhere, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)

    from transformers import AutoModelForCausalLM

    rotary = AutoModelForCausalLM.from_pretrained(folder).model.rotary_emb
    expected = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(rotary.inv_freq, expected)


def random_streams() -> dict[str, list[float]]:
    """What each of Megatron's random streams draws, twice, with a draw from the ordinary one between."""
    tracker = megatron("tensor_parallel.random").get_cuda_rng_tracker()
    drawn: dict[str, list[float]] = {"ordinary": torch.rand(2).tolist()}
    for name in ("model-parallel-rng", "expert-parallel-rng"):
        drawn[name] = []
        for _ in range(2):
            with tracker.fork(name):
                drawn[name] += torch.rand(2).tolist()
            drawn["ordinary"] += torch.rand(2).tolist()
    return drawn


def test_random_streams_differ_between_tensor_parallel_ranks_only_where_they_should() -> None:
    first, second = run_ranks(2, random_streams, tensor_model_parallel_size=2)
    assert first["ordinary"] == second["ordinary"]
    assert not set(first["model-parallel-rng"]) & set(second["model-parallel-rng"])
    for drawn in (first, second):
        values = [value for stream in drawn.values() for value in stream]
        assert len(set(values)) == len(values), "a stream repeats itself or another"
    again, _ = run_ranks(2, random_streams, tensor_model_parallel_size=2)
    assert again == first, "the seed decides"
