"""Runs inside SGLang's workers: the function that ``--custom-weight-loader`` names.

The model's own ``load_weights`` knows where each Hugging Face tensor goes, fused, sharded or renamed; it ends in
``parameter.copy_(part of the tensor)``. The tensors handed to it here are of a subclass that decides what that copy
does: write only the elements that changed, or write nothing and read. So no mapping of names is repeated here, and no
copy of the weights is kept.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron_vespo.sglang_weights import memory, wire
from megatron_vespo.sglang_weights.wire import Change

Write = Callable[[torch.Tensor, torch.Tensor], None]

# Elements read before they are summed up.
_PENDING_NUMEL = 2**22
_POSITION_BITS = 40
UNREADABLE = -1
"""Count reported of every tensor if this model's loader cannot be followed."""


def load(model: Any, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Do what the trainer asks; a collective where the request names a process group.

    Args:
        model: SGLang's model.
        named_tensors: One tensor, whose name is the request.
    """
    ((text, _),) = named_tensors
    request = wire.Request.decode(text)
    device = next(model.parameters()).device
    if request.action == "map":
        _load_shared(model, request, device)
    elif request.action == "patch":
        flat = torch.empty(sum(c.value_bytes + c.gap_bytes for c in request.changes), dtype=torch.uint8, device=device)
        dist.broadcast(flat, src=0, group=_group(request))
        with torch.no_grad():
            model.load_weights(_patches(flat, request.changes))
    elif request.report:
        _write(Path(request.report), _report(model, request.changes, device))
    else:
        dist.gather(_report(model, request.changes, device), dst=0, group=_group(request))


def _group(request: wire.Request) -> dist.ProcessGroup:
    return distributed_c10d._resolve_process_group(distributed_c10d.GroupName(request.group))


def _load_shared(model: Any, request: wire.Request, device: torch.device) -> None:
    """Load tensors that lie in memory of this device; when it returns, the trainer may write there again."""
    used = sum(change.value_bytes for change in request.changes)
    flat = memory.open_shared(request.memory, device)[:used]
    with torch.no_grad():
        model.load_weights(_patches(flat, request.changes))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _write(path: Path, report: torch.Tensor) -> None:
    """All of the file or none."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(report.cpu().numpy().tobytes())
    temporary.replace(path)


class _Intercepted(torch.Tensor):
    """A tensor whose copying into another one, whole or in part, is left to a function.

    Views and results of other operations are of this class too. Other ways of writing it into a tensor are refused.
    """

    write: Write

    @classmethod
    def wrap(cls, tensor: torch.Tensor, write: Write) -> _Intercepted:
        """The tensor, to be written by ``write(target, source)``."""
        wrapped = tensor.as_subclass(cls)
        wrapped.write = write
        return wrapped

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if writes and not isinstance(args[0], cls):
            if name != "copy_":
                raise NotImplementedError(f"weights written by {name}")
            target, source = args[0], args[1]
            with torch._C.DisableTorchFunctionSubclass():
                source.write(target, source.as_subclass(torch.Tensor).expand_as(target))
            return target
        result = super().__torch_function__(func, types, tuple(args), kwargs or {})
        write = next((arg.write for arg in _flat(args) if isinstance(arg, cls) and hasattr(arg, "write")), None)
        for part in _flat((result,)):
            if isinstance(part, cls) and write is not None:
                part.write = write
        return result


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _patches(flat: torch.Tensor, changes: Sequence[Change]) -> Iterator[tuple[str, torch.Tensor]]:
    """HF names and tensors for ``load_weights``, one at a time: only one dense tensor exists beside the weights."""
    for change, values, gaps in wire.split_flat(flat, changes):
        if change.count == wire.WHOLE:
            yield change.name, values.view(change.shape)
        else:
            yield change.name, _Intercepted.wrap(wire.apply_gaps(change, values, gaps), _overwrite)


def _overwrite(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy what is not NaN."""
    source = source.to(device=target.device, dtype=target.dtype)
    target.copy_(torch.where(source.isnan(), target, source))


class _Reader:
    """Sums up what the model holds of each tensor, by number of the tensor."""

    def __init__(self, tensors: int, device: torch.device) -> None:
        self.report = torch.zeros((tensors, 3), dtype=torch.int64, device=device)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._numel = 0

    def read(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Instead of copying: take note of what is there. ``source`` says which tensor and position an element is."""
        if source.dtype != torch.int64:
            raise NotImplementedError(f"weights converted to {source.dtype} before they are written")
        self._pending.append((target.detach(), source))
        self._numel += target.numel()
        if self._numel >= _PENDING_NUMEL:
            self.flush()

    def flush(self) -> None:
        """Sum up what is pending."""
        pieces = [part for target, source in self._pending for part in _by_tensor(target, source)]
        self._pending, self._numel = [], 0
        if not pieces:
            return
        sums = wire.fingerprints([(values, positions) for _, values, positions in pieces])
        numbers = torch.tensor([number for number, _, _ in pieces], device=sums.device)
        counts = torch.tensor([values.numel() for _, values, _ in pieces], device=sums.device)
        dtypes = torch.tensor([wire.DTYPES.index(values.dtype) for _, values, _ in pieces], device=sums.device)
        self.report[:, 0].index_add_(0, numbers, counts)
        self.report[:, 1].index_add_(0, numbers, sums)
        self.report[numbers, 2] = dtypes


def _by_tensor(target: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(number of the tensor, values, positions); several if the loader put tensors together before it wrote them."""
    numbers = source >> _POSITION_BITS
    positions = source & (2**_POSITION_BITS - 1)
    first, last = int(numbers.min()), int(numbers.max())
    if first == last:
        yield first, target, positions
        return
    for number in numbers.unique().tolist():
        mine = numbers == number
        yield number, target[mine], positions[mine]


def _report(model: Any, changes: Sequence[Change], device: torch.device) -> torch.Tensor:
    """[tensors, 3]: elements of each tensor on this worker, fingerprint, number of the dtype."""
    reader = _Reader(len(changes), device)

    def sources() -> Iterator[tuple[str, torch.Tensor]]:
        for number, change in enumerate(changes):
            first = number << _POSITION_BITS
            numbers = torch.arange(first, first + torch.Size(change.shape).numel(), device=device)
            yield change.name, _Intercepted.wrap(numbers.view(change.shape), reader.read)

    try:
        with torch.no_grad():
            model.load_weights(sources())
            reader.flush()
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError):  # a raise would end the server
        traceback.print_exc()
        reader.report[:, 0] = UNREADABLE
    return reader.report
