"""Counts the operations at which a GPU and the host wait for each other, on a machine that need not have a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their result's shape or value is decided by data, so the host must look at it.
READS = frozenset(
    {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "_linalg_check_errors"}
    | {"nonzero", "argwhere", "masked_select", "bincount", "histc"}
    | {"_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}
)
INDEXING = frozenset({"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"})


@dataclass
class HostSyncs:
    """What was counted.

    Attributes:
        events: One line for each, in order: what it was, and where the code outside torch was that asked for it.
    """

    events: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.events)


@contextmanager
def count_host_syncs(device: str = "cpu") -> Iterator[HostSyncs]:
    """Count, within the block, what makes the host wait for the tensors of one device type; autograd's work included.

    Counted, each once: reading a value (``item``, ``bool``, ``float``, ``int``, ``tolist``, ``numpy``, ``cpu``), a
    result whose shape depends on data (``nonzero``, ``masked_select``, ``unique``, ``bincount``, ``repeat_interleave``
    without ``output_size``), a boolean mask as an index, read or written (also ``x[mask] = 0``: CUDA has a way around
    the wait there, which ``masked_fill_`` makes sure of), ``equal``, and a copy to the host.

    With device="cpu" all tensors stand for those of a GPU, except what ``cpu()`` returned and what was computed from
    nothing else: ``x.cpu().numpy()`` is one wait. There, ``cpu()`` really copies, as it does on a GPU. What cannot be
    seen there: ``to("cpu")``, which does nothing on a CPU, and ``copy_`` into a new CPU tensor. And a tensor that would
    be on the host in a real run counts when it is read, so the count errs upwards only. With device="cuda" the tensors
    of CUDA alone count, and every copy of them to the host does. Copies to a device are never counted.
    """
    counter = _Counter(device)
    with ExitStack() as stack:
        for name in ("cpu", "numpy", "tolist"):
            stack.enter_context(mock.patch.object(Tensor, name, counter.counting(name, getattr(Tensor, name))))
        stack.enter_context(counter)
        yield counter.syncs


class _Counter(TorchDispatchMode):
    """Sees each operation below autograd. ``tolist`` and ``numpy`` are none, hence ``counting``."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.syncs = HostSyncs()
        self.device = device
        self.silent = False
        # Memory that is the host's though its device is the one counted. A held weak reference keeps its key unique.
        self.on_host: dict[int, StorageWeakRef] = {}

    def is_awaited(self, tensor: Tensor) -> bool:
        """Whether the host must wait to read this tensor."""
        return tensor.device.type == self.device and tensor.untyped_storage()._cdata not in self.on_host

    def mark_on_host(self, tensor: Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self.on_host[tensor.untyped_storage()._cdata] = reference

    def record(self, what: str) -> None:
        if not self.silent:
            self.syncs.events.append(f"{what} at {_caller()}")

    def counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """The tensor method ``original``, which counts as one event with all that happens within."""

        def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.is_awaited(tensor):
                return original(tensor, *args, **kwargs)
            self.record(name)
            before, self.silent = self.silent, True
            try:
                result = original(tensor, *args, **kwargs)
                if name == "cpu" and self.device == "cpu":
                    result = result.clone() if result is tensor else result
                    self.mark_on_host(result)
                return result
            finally:
                self.silent = before

        return method

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(self.is_awaited(tensor) for tensor in tensors):
            if self.waits(func, args, kwargs):
                self.record(str(func))
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if tensors and self.device == "cpu":
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.mark_on_host(leaf)
        return result

    def waits(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this operation, on awaited tensors, makes the host wait."""
        name = func.__name__.partition(".")[0]
        if name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            return any(index.dtype in (torch.bool, torch.uint8) and self.is_awaited(index) for index in indices)
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name == "_to_copy":
            return self.device != "cpu" and torch.device(kwargs.get("device") or args[0].device).type == "cpu"
        if name == "copy_":
            return not self.is_awaited(args[0])
        return name in READS


def _caller() -> str:
    """File and line of the innermost frame outside torch and this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if path != __file__ and "/torch/" not in path and not path.startswith("<"):
            break
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{frame.f_lineno}"
