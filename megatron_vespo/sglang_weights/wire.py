"""Weights on their way to SGLang, as trainer and server both know them: requests, sparse changes, fingerprints.

Neither Megatron nor SGLang is imported here. A request to the loader announces what the trainer is about to send over
a process group, or says where it lies in memory that both sides share; it travels in SGLang's
``/update_weights_from_tensor`` as the name of an empty tensor.
"""

from __future__ import annotations

import base64
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from megatron_vespo.sglang_weights.memory import Handle

WHOLE = -1
"""``Change.count`` of a tensor that is sent as it is."""

# Distances between changed positions are 16 bits wide: positions this far apart are always sent, changed or not.
_STRIDE = 2**16 - 1
_GROUP_NUMEL = 2**22
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of weights by the number they have in a report of fingerprints."""


@dataclass(frozen=True, slots=True)
class Change:
    """What is sent of one tensor: ``count`` values with as many distances before each, or all of it.

    Attributes:
        name: HF name.
        shape: Whole shape.
        dtype: As torch prints it, without ``torch.``.
        count: Values sent, :data:`WHOLE` for all of them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int

    @staticmethod
    def whole(name: str, tensor: torch.Tensor) -> Change:
        """All of a tensor."""
        return Change(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), WHOLE)

    @property
    def value_bytes(self) -> int:
        """Bytes of the values sent."""
        numel = torch.Size(self.shape).numel() if self.count == WHOLE else self.count
        return numel * getattr(torch, self.dtype).itemsize

    @property
    def gap_bytes(self) -> int:
        """Bytes of the distances sent."""
        return 0 if self.count == WHOLE else 2 * self.count


class _EmptyTensor:
    """Is a tensor without elements once it was pickled and unpickled.

    A tensor that has a storage is pickled by a function that Megatron replaces, and SGLang refuses the other's name.
    """

    def __reduce__(self) -> tuple[type[torch.Tensor], tuple[()]]:
        return torch.Tensor, ()


@dataclass(frozen=True, slots=True)
class Request:
    """What the loader is asked to do.

    Attributes:
        action: ``patch``: receive one flat uint8 tensor and apply the changes; ``map``: the same with one that lies in
            shared memory; ``fingerprint``: report fingerprints.
        changes: The tensors, in the order they are sent; for a fingerprint, dtype and count mean nothing.
        group: Name of the process group, for what is sent over it and for reports.
        memory: Of ``map``, the shared memory of each device.
        report: Path of a file that a report goes to instead of the group, the worker's number appended.
    """

    action: str
    changes: tuple[Change, ...]
    group: str = ""
    memory: Mapping[str, Handle] = field(default_factory=dict)
    report: str = ""

    def encode(self, worker: int) -> str:
        """As SGLang takes it for the worker of this number: named tensors, pickled, in base64."""
        text = json.dumps(
            {
                "action": self.action,
                "changes": [list(asdict(change).values()) for change in self.changes],
                "group": self.group,
                "memory": self.memory,
                "report": f"{self.report}.{worker}" if self.report else "",
            }
        )
        return base64.b64encode(pickle.dumps([(text, _EmptyTensor())])).decode()

    @staticmethod
    def decode(text: str) -> Request:
        """The request that :meth:`encode` made the name of."""
        fields = json.loads(text)
        rows = fields.pop("changes")
        changes = tuple(Change(name, tuple(shape), dtype, count) for name, shape, dtype, count in rows)
        return Request(changes=changes, **fields)


def find_change(name: str, new: torch.Tensor, old: torch.Tensor) -> tuple[Change, torch.Tensor, torch.Tensor | None]:
    """What turns ``old`` into ``new`` bit for bit: the change, its values, and the distances if it is sparse.

    A tensor is sent whole where that takes fewer bytes, or where a NaN is among the new values: NaN marks what the
    server keeps.
    """
    shape, dtype = tuple(new.shape), str(new.dtype).removeprefix("torch.")
    flat, bits = new.reshape(-1), _BITS[new.dtype.itemsize]
    differs = flat.view(bits) != old.reshape(-1).view(bits)
    differs[_STRIDE - 1 :: _STRIDE] = True
    positions = differs.nonzero().view(-1)
    values = flat[positions]
    dense = flat.numel() * new.dtype.itemsize <= positions.numel() * (new.dtype.itemsize + 2)
    if flat.numel() == 1 or dense or bool(values.isnan().any()):
        return Change(name, shape, dtype, WHOLE), flat, None
    gaps = torch.diff(positions, prepend=positions.new_tensor([-1])).to(torch.int32).to(torch.uint16)
    return Change(name, shape, dtype, positions.numel()), values, gaps


def apply_gaps(change: Change, values: torch.Tensor, gaps: torch.Tensor) -> torch.Tensor:
    """The tensor with NaN wherever the server keeps what it has."""
    tensor = torch.full(change.shape, torch.nan, dtype=values.dtype, device=values.device)
    positions = gaps.to(torch.int64).cumsum(0) - 1
    tensor.view(-1)[positions] = values
    return tensor


def split_flat(flat: torch.Tensor, changes: Sequence[Change]) -> Iterator[tuple[Change, torch.Tensor, torch.Tensor]]:
    """Changes with their values and distances from one flat uint8 tensor: all values, then all distances."""
    sizes = [change.value_bytes for change in changes] + [change.gap_bytes for change in changes]
    parts = flat.split(sizes)
    for change, values, gaps in zip(changes, parts[: len(changes)], parts[len(changes) :], strict=True):
        # clone(): a part need not begin at a multiple of its dtype's size.
        yield change, values.clone().view(getattr(torch, change.dtype)), gaps.clone().view(torch.uint16)


def fingerprints(pieces: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> torch.Tensor:
    """Sum over the elements of each piece of ``bits * (2 * position + 1)`` modulo 2**64; shape [pieces], int64.

    The factor is odd: no change of a single element goes unnoticed. Sums of the pieces of a tensor add up to the
    tensor's own, in whatever way it is cut.

    Args:
        pieces: Values, and the positions, int64, of the same shape, that they have in the whole tensor; None where
            they are the whole tensor.
    """
    device = pieces[0][0].device if pieces else None
    result = torch.zeros(len(pieces), dtype=torch.int64, device=device)
    for group in _groups(pieces):
        bits = torch.cat([values.view(_BITS[values.dtype.itemsize]) for _, values, _ in group])
        total = torch.cat([positions for _, _, positions in group]).mul_(2).add_(1).mul_(bits).cumsum_(0)
        ends = torch.tensor([values.numel() for _, values, _ in group], device=device).cumsum(0) - 1
        at_ends = total[ends]
        sums = torch.diff(at_ends, prepend=at_ends.new_zeros(1))
        result.index_add_(0, torch.tensor([number for number, _, _ in group], device=device), sums)
    return result


_Part = tuple[int, torch.Tensor, torch.Tensor]


def _groups(pieces: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> Iterator[list[_Part]]:
    """Parts of about the same size in all, of one dtype: (number of the piece, values, positions), both flat.

    Many small pieces go together, since a tensor operation takes microseconds even on a tiny tensor; large ones are
    cut, since the sums are of 8 bytes an element.
    """
    group: list[_Part] = []
    numel = 0
    for part in _parts(pieces):
        size = part[1].numel()
        if group and (part[1].dtype != group[0][1].dtype or numel + size > _GROUP_NUMEL):
            yield group
            group, numel = [], 0
        group.append(part)
        numel += size
    if group:
        yield group


def _parts(pieces: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> Iterator[_Part]:
    for number, (values, positions) in enumerate(pieces):
        start = 0
        for part in values.reshape(-1).split(_GROUP_NUMEL):
            stop = start + part.numel()
            if positions is None:
                yield number, part, torch.arange(start, stop, device=part.device)
            else:
                yield number, part, positions.reshape(-1)[start:stop]
            start = stop
