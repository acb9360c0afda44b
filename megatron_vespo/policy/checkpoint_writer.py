"""Writing a Megatron ``torch_dist`` checkpoint: planned by all ranks together, written by each alone.

Megatron's own writer loses what went wrong and waits for ranks that failed (strategies/filesystem_async.py:285,
strategies/state_dict_saver.py:247). So its plan is carried out here, in the same format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_vespo.checkpoint_folder import FileRecord, Writable
from megatron_vespo.files import naming, sync
from megatron_vespo.models.archive import Archives
from megatron_vespo.models.torch_dist_files import write_file
from megatron_vespo.models.untrusted import METADATA
from megatron_vespo.platform.megatron import plan_saves_in_this_process


@dataclass(frozen=True)
class Written:
    """What a rank wrote.

    Attributes:
        results: Where its tensors and objects lie.
        files: Its files by name.
    """

    results: list[WriteResult]
    files: dict[str, FileRecord]


class _PlanningStrategy(TorchDistSaveShardedStrategy):
    """Keeps Megatron's plan instead of writing."""

    writer: FileSystemWriterAsync
    metadata: Metadata | None

    def _get_save_and_finalize_callbacks(self, writer: Any, plan: Any, async_strategy: str) -> AsyncRequest:
        self.writer, self.metadata = writer, plan[1]
        return AsyncRequest(None, (), [])


class PlannedSave:
    """What this rank writes of a checkpoint. Making it is a collective; ``write()`` is not, and may run in a thread."""

    def __init__(
        self, state: dict[str, Any], folder: Path, content_metadata: dict[str, Any], *, validate: bool
    ) -> None:
        """Plan.

        Args:
            state: Sharded state.
            folder: An empty folder that all ranks see.
            content_metadata: Megatron's names for the way of saving; kept in the checkpoint.
            validate: Whether to make sure that the ranks' shards fit together.
        """
        plan_saves_in_this_process()
        strategy = _PlanningStrategy()
        dist_checkpointing.save(
            state,
            str(folder),
            sharded_strategy=strategy,
            validate_access_integrity=validate,
            async_sharded_save=True,
            async_strategy="mcore",
            content_metadata=content_metadata,
        )
        self._folder = folder
        self._writer, self._metadata = strategy.writer, strategy.metadata
        # One thread, so one file: objects first, then tensors.
        self._name = ""
        self._data: list[tuple[WriteItem, Any]] = []
        for _, name, (objects, tensors) in strategy.writer.write_buckets or ():
            self._name, self._data = name, [*objects, *tensors]
        strategy.writer.write_buckets = None  # or what detach() has copied would stay in memory

    def detach(self) -> None:
        """Copy what is to be written to host memory: training may go on."""
        for number, (item, data) in enumerate(self._data):
            if isinstance(data, torch.Tensor):
                self._data[number] = item, data.to("cpu", copy=True)

    def write(self) -> Written:
        """Write this rank's file.

        Raises:
            OSError: Writing failed; it names the file.
        """
        if not self._data:
            return Written([], {})
        archives, data = Archives(), iter(self._data)

        def write(item: WriteItem, stream: Writable) -> None:
            value = next(data)[1]
            if item.type == WriteItemType.BYTE_IO:
                stream.write(value.getbuffer())
            else:
                archives.save(value.cpu(), stream)

        results, record = write_file(self._folder / self._name, [item for item, _ in self._data], write)
        self._data = []
        return Written(results, {self._name: record})

    def write_metadata(self, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all ranks have written: ``.metadata`` and ``metadata.json``.

        Raises:
            OSError: Writing failed.
        """
        assert self._metadata is not None
        # Every rank's plan, for savers that keep their plans; it would double the file.
        vars(self._metadata).pop("all_local_plans", None)
        with naming(self._folder / METADATA):
            self._writer.finish(self._metadata, results)
        config = self._folder / CONFIG_FNAME
        with naming(config):
            save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        sync(config)
