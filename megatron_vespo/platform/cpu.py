"""Megatron-Core 0.19.2 on a machine without CUDA, its files untouched.

Megatron names the device "cuda" in its sources. Here every ``megatron.core`` module is handed its own ``torch``: a copy
of the torch namespace in which those names mean the CPU. An import hook puts it in place right after each Megatron
module has run, so nothing outside ``megatron.core`` can see it, and ``torch.cuda.is_available()`` stays false.

Wrapping ``torch.arange`` and friends in torch itself is shorter and wrong. torch knows its factories by identity
(torch/utils/_device.py, ``_device_constructors``): a wrapped one no longer obeys ``with torch.device("meta")``. Hugging
Face models are built under it, and their rotary tables, in no checkpoint, came out as uninitialised memory.

Two tensor methods cannot be reached through a namespace. They are replaced on ``torch.Tensor`` and change their answer
only for callers inside ``megatron.core``.

Each adaptation stands beside the Megatron file (under megatron/core) and line that forces it.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

_CPU = torch.device("cpu")
_MEGATRON = "megatron.core"


class _Stream:
    """Stands for a CUDA stream: CPU work is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def record_event(self, event: object = None) -> _Event:
        """An event that has happened already."""
        return _Event()


class _Event(_Stream):
    """Stands for a CUDA event."""

    def record(self, stream: object = None) -> None:
        """Nothing to record."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _call_now(callback: Callable[[], None], **kwargs: object) -> None:
    callback()


@contextlib.contextmanager
def _on_stream(stream: object) -> Iterator[None]:
    yield


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


def _is_cuda(device: object) -> bool:
    return str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory that reads ``device="cuda"`` as the CPU and cannot pin memory."""

    def build(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):  # models/common/embeddings/rope_utils.py:62
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return build


def _all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """The gloo backend wants lists of int where Megatron hands tensors or numpy arrays (mappings.py:460)."""
    sizes = [None if split is None else [int(n) for n in split] for split in (output_split_sizes, input_split_sizes)]
    return torch.distributed.all_to_all_single(output, input, sizes[0], sizes[1], group=group, async_op=async_op)


def _all_gather(outputs: list[torch.Tensor], input: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
    """The gloo backend gathers only equal shapes; expert tensor parallelism needs others (mappings.py:154)."""
    if len({output.shape for output in outputs}) == 1:
        return torch.distributed.all_gather(outputs, input, group=group, async_op=async_op)
    inputs = [input.contiguous()] * len(outputs)
    return _exchange(outputs, inputs, group)


def _reduce_scatter(output: torch.Tensor, inputs: list[torch.Tensor], group: Any = None) -> Any:
    """The same the other way round (mappings.py:197); the sum runs in rank order on every rank."""
    parts = [torch.empty_like(output) for _ in inputs]
    _exchange(parts, [part.contiguous() for part in inputs], group)
    torch.sum(torch.stack(parts), dim=0, out=output)


def _exchange(outputs: list[torch.Tensor], inputs: list[torch.Tensor], group: Any) -> None:
    """All-to-all of a tensor for each rank, of any sizes."""
    received = outputs[0].new_empty(sum(output.numel() for output in outputs))
    torch.distributed.all_to_all_single(
        received,
        torch.cat([part.reshape(-1) for part in inputs]),
        [output.numel() for output in outputs],
        [part.numel() for part in inputs],
        group=group,
    )
    for output, part in zip(outputs, received.split([output.numel() for output in outputs]), strict=True):
        output.copy_(part.view(output.shape))


# torch.cuda.<name> as megatron.core sees it.
_CUDA: dict[str, Any] = {
    "current_device": lambda: (
        _CPU
    ),  # tensor_parallel/random.py:165, mappings.py:95, moe/router.py:98, p2p_communication.py:334
    "default_generators": {
        None: torch.default_generator,
        _CPU: torch.default_generator,
    },  # tensor_parallel/random.py:166
    "get_rng_state": _get_rng_state,  # tensor_parallel/random.py:303
    "set_rng_state": _set_rng_state,
    "manual_seed": torch.manual_seed,  # tensor_parallel/random.py:305
    "_lazy_call": _call_now,  # tensor_parallel/random.py:174; without it the random streams are silently wrong
    "_lazy_init": _nothing,  # tensor_parallel/random.py:121
    "Stream": _Stream,  # transformer/moe/token_dispatcher.py:469, 946
    "Event": _Event,
    "current_stream": _Stream,  # transformer/moe/token_dispatcher.py:922
    "stream": _on_stream,
    "synchronize": _nothing,  # pipeline_parallel/p2p_communication.py:419
    "empty_cache": _nothing,
}

# torch.distributed.<name> as megatron.core sees it.
_DISTRIBUTED = {
    "all_to_all_single": _all_to_all_single,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
}

# torch.<name>(device="cuda") as megatron.core calls it.
_FACTORIES = (
    "tensor",  # optimizer/optimizer.py:690, optimizer/clip_grads.py:96
    "zeros",  # pipeline_parallel/schedules.py:749, optimizer/clip_grads.py:108
    "ones",
    "empty",
    "full",
    "arange",
    "zeros_like",
    "empty_like",
)

_CUDA_TYPES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def _copy_namespace(module: types.ModuleType, overrides: dict[str, Any]) -> types.ModuleType:
    """A module with the same names, some replaced; names that torch makes on first use are still found."""
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(module.__dict__)
    copy.__dict__.update(overrides)
    copy.__dict__["__getattr__"] = lambda name: getattr(module, name)
    return copy


def _megatron_torch() -> types.ModuleType:
    random = _copy_namespace(torch.cuda.random, {"get_rng_state": _get_rng_state, "set_rng_state": _set_rng_state})
    overrides: dict[str, Any] = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    overrides["cuda"] = _copy_namespace(torch.cuda, {**_CUDA, "random": random})
    overrides["distributed"] = _copy_namespace(torch.distributed, _DISTRIBUTED)
    return _copy_namespace(torch, overrides)


class _Hook(importlib.abc.MetaPathFinder):
    """Finds ``megatron.core`` modules as usual and gives each its ``torch`` once it has run."""

    def __init__(self) -> None:
        self.torch = _megatron_torch()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not (fullname == _MEGATRON or fullname.startswith(_MEGATRON + ".")):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path, self.torch)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, megatron_torch: types.ModuleType) -> None:
        super().__init__(name, path)
        self._torch = megatron_torch

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        names = module.__dict__
        if names.get("torch") is torch:
            names["torch"] = self._torch
        if names.get("dist") is torch.distributed:  # transformer/moe modules import it under this name
            names["dist"] = self._torch.distributed
        for name in ("_lazy_call", "_lazy_init"):  # tensor_parallel/random.py: from torch.cuda import ...
            if name in names:
                names[name] = _CUDA[name]


def _from_megatron() -> bool:
    """Whether the caller of the function that asks is a ``megatron.core`` function."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(_MEGATRON)


def _adapt_tensor_methods() -> None:
    tensor_type, tensor_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The optimizers sort parameters by 'torch.cuda.FloatTensor' (optimizer/distrib_optimizer.py:466)."""
        answer = tensor_type(self, *args, **kwargs)
        return _CUDA_TYPES.get(answer, answer) if isinstance(answer, str) and _from_megatron() else answer

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Receive buffers of resharding are moved with .cuda() (optimizer/distrib_optimizer.py:1374)."""
        return self if _from_megatron() else tensor_cuda(self, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign,assignment]


def install() -> None:
    """Make ``megatron.core`` run on the CPU. Call once, before its first import; does nothing the second time.

    Raises:
        RuntimeError: ``megatron.core`` was imported already, or CUDA is there.
    """
    if any(isinstance(finder, _Hook) for finder in sys.meta_path):
        return
    if torch.cuda.is_available():
        raise RuntimeError("platform.cpu.install() on a machine with CUDA: Megatron-Core runs there as it is")
    if _MEGATRON in sys.modules:
        raise RuntimeError("megatron.core was imported before megatron_vespo.platform.prepare(); call it first")
    # jit.py:26: jit_fuser = torch.compile would compile small fusions with a C++ compiler for minutes.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # sgl-flash-mla raises OSError without libcuda, where Megatron expects ImportError (transformer/attention.py).
    sys.modules.setdefault("flash_mla", None)  # type: ignore[arg-type]
    sys.meta_path.insert(0, _Hook())
    _adapt_tensor_methods()
