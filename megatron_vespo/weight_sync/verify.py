"""Proof that the servers hold the weights that were pushed: fingerprints of every tensor, taken on both sides.

The server's are summed up from the memory that its model computes with, over all workers, so that a tensor that got
lost, changed or stayed old on the way is noticed, whatever the transport. See ``sglang_weights.wire.fingerprints``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import torch

from megatron_vespo import platform
from megatron_vespo.errors import UserError
from megatron_vespo.sglang_weights.loader import UNREADABLE
from megatron_vespo.sglang_weights.wire import DTYPES, WHOLE, Change, Request, fingerprints
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.transport import NamedTensors


class Reports(Protocol):
    """How fingerprints come back from the servers' workers."""

    def collect(self, servers: Servers, changes: Sequence[Change]) -> list[torch.Tensor]:
        """Of each server [workers, tensors, 3]: elements, fingerprint, number of the dtype; int64, on the CPU."""
        ...


class GroupReports:
    """Over the process group that rank 0 forms with all workers."""

    def collect(self, servers: Servers, changes: Sequence[Change]) -> list[torch.Tensor]:
        """As :class:`Reports` says."""
        like = torch.zeros((len(changes), 3), dtype=torch.int64, device=platform.device())
        request = Request("fingerprint", tuple(changes), servers.group_name)
        reports = servers.gather(like, lambda control: servers.load(control, request))
        return [report.cpu() for report in reports]


class FileReports:
    """As files, where there is no such group: NCCL knows each GPU once, and trainer and servers share them.

    Args:
        folder: Where the workers of all servers can write, and rank 0 reads.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._asked = folder.absolute(), 0

    def collect(self, servers: Servers, changes: Sequence[Change]) -> list[torch.Tensor]:
        """As :class:`Reports` says."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._asked += 1
        paths = {control: self._folder / f"{self._asked}_{n}" for n, control in enumerate(servers.controls)}
        servers.each(
            lambda control: servers.load(control, Request("fingerprint", tuple(changes), report=str(paths[control])))
        )
        reports = [
            torch.stack([_take_report(path.with_name(f"{path.name}.{worker}")) for worker in range(workers)])
            for path, workers in zip(paths.values(), servers.workers, strict=True)
        ]
        with suppress(OSError):  # the disk transport's weights may be there
            self._folder.rmdir()
        return reports


def _take_report(path: Path) -> torch.Tensor:
    try:
        content = path.read_bytes()
        path.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: a server's report on its weights cannot be read: {error.strerror or error}; the run's folder must"
            " lie where all nodes see it, or set weight_sync.verify: none"
        ) from error
    return torch.frombuffer(bytearray(content), dtype=torch.int64).view(-1, 3)


class Verifier:
    """Compares the weights of a push with what the servers hold; on rank 0.

    Args:
        servers: Who must hold them; started with our loader as ``custom_weight_loader``.
        shapes: Shapes of all tensors by HF name.
        reports: How the servers answer.
    """

    def __init__(self, servers: Servers, shapes: Mapping[str, tuple[int, ...]], reports: Reports) -> None:
        self._servers, self._reports = servers, reports
        # A tensor of one element is read as a number by SGLang's loaders, which cannot be followed.
        self._shapes = {name: shape for name, shape in shapes.items() if torch.Size(shape).numel() > 1}
        self._numbers = {name: number for number, name in enumerate(self._shapes)}
        self._numel = torch.tensor([torch.Size(shape).numel() for shape in self._shapes.values()])
        self._changes = tuple(Change(name, shape, "", WHOLE) for name, shape in self._shapes.items())
        self._dtypes: torch.Tensor | None = None
        self._expected = torch.zeros(len(self._shapes), dtype=torch.int64)

    def begin(self) -> None:
        """Start a push; at the first, ask the servers for the dtype in which they hold each tensor."""
        self._expected.zero_()
        if self._dtypes is None:
            self._dtypes = self._ask()[0][0, :, 2]

    def add(self, tensors: NamedTensors) -> None:
        """Take the fingerprints of one bucket."""
        assert self._dtypes is not None
        known = [(self._numbers[name], tensor) for name, tensor in tensors if name in self._numbers]
        dtypes = [DTYPES[number] for number in self._dtypes[[number for number, _ in known]].tolist()]
        pieces = [(tensor.to(dtype), None) for (_, tensor), dtype in zip(known, dtypes, strict=True)]
        self._expected[[number for number, _ in known]] = fingerprints(pieces).cpu()

    def mismatches(self) -> list[str]:
        """Names of the tensors that a server holds otherwise than they were pushed.

        Raises:
            UserError: The fingerprints could not be taken.
        """
        wrong = torch.zeros(len(self._shapes), dtype=torch.bool)
        for report in self._ask():
            counts, sums = report[:, :, 0].sum(0), report[:, :, 1].sum(0)
            # Tensor-parallel workers may all hold the whole of a tensor, or several the same part.
            copies = counts // self._numel
            wrong |= (copies == 0) | (copies * self._numel != counts) | (sums != copies * self._expected)
        names = list(self._shapes)
        return [names[number] for number in wrong.nonzero().view(-1).tolist()]

    def _ask(self) -> list[torch.Tensor]:
        reports = self._reports.collect(self._servers, self._changes)
        if any(bool((report[:, :, 0] == UNREADABLE).any()) for report in reports):
            raise UserError(
                f"{self._servers.urls}: what the server's model holds cannot be read back, its log says why; set"
                " weight_sync.verify: none"
            )
        return reports
