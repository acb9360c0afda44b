"""What Megatron calls the weights in a ``torch_dist`` checkpoint, and which Hugging Face tensors each of them holds.

Names, shapes and offsets are those that Megatron's own ``GPTModel.sharded_state_dict()`` gives for the whole model on
one rank; a checkpoint of any tensor, pipeline and expert parallelism has the same ones. The model stands on the meta
device: it has shapes and no memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megatron_vespo.errors import UserError
from megatron_vespo.models.build import build_model, transformer_config
from megatron_vespo.models.conversion import Placement, WeightTable
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.naming import Weight, parse_name
from megatron_vespo.platform.collector import collector_paused

SCHEMES: tuple[dict[str, Any], ...] = (
    {"singleton_local_shards": False},  # as Megatron-LM 0.19 saves
    {"non_homogeneous_layers": True},
    {"singleton_local_shards": True},
)
"""Megatron's ways of naming the same weights: the ``metadata`` argument of ``sharded_state_dict()``."""

_MODEL_DTYPE = torch.bfloat16

# By whether attention is latent: norms as Megatron's layers of Transformer Engine have them -> as its local ones do.
_LOCAL_NAMES = {
    False: ((r"\.pre_mlp_layernorm\.", ".mlp.linear_fc1.layer_norm_"),),
    True: (
        (r"\.linear_(q|kv)_up_proj\.layer_norm_", r".\1_layernorm."),
        (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
    ),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a stored tensor that belongs to one weight; gate and up projections are two.

    Attributes:
        key: Name of the stored tensor; of homogeneous layers it is one for all, and of their experts.
        global_shape: Its shape.
        offset: Where the part begins in it.
        shape: Shape of the part there, with a 1 for layer and expert.
        placement: The part as rows of the HF tensors.
        float32: Whether Megatron keeps it in float32 whatever the dtype of the model.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    placement: Placement
    float32: bool

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def without_padding(self) -> Part:
        """The part without the rows that pad the vocabulary."""
        placement = self.placement
        if not placement.layout.padded:
            return self
        rows = sum(piece.rows for piece in placement.pieces)
        axis = len(self.shape) - len(placement.shape)
        shape = (*self.shape[:axis], rows, *self.shape[axis + 1 :])
        return Part(self.key, self.global_shape, self.offset, shape, placement.narrowed(0, rows), self.float32)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint of a model holds: its parts, weight after weight, and its objects by their unique keys."""

    parts: tuple[Part, ...]
    objects: tuple[str, ...]

    def of_local_layers(self, latent_attention: bool) -> Contents:
        """The same as Megatron-LM saves it with ``--transformer-impl local``; the objects are left as they are."""
        parts = []
        for part in self.parts:
            key = part.key
            for pattern, local in _LOCAL_NAMES[latent_attention]:
                key = re.sub(pattern, local, key)
            parts.append(replace(part, key=key))
        return Contents(tuple(parts), self.objects)


class TorchDistModel:
    """A model without memory that knows the names. Needs Megatron's process groups, of one rank."""

    def __init__(self, architecture: Architecture, make_vocab_size_divisible_by: int = 128) -> None:
        section = {"bf16": True, "perform_initialization": False}
        self._table = WeightTable(architecture)
        with collector_paused(), torch.device("meta"):
            (self._model,) = build_model(
                architecture,
                transformer_config(architecture, section, "local"),
                layer_spec="local",
                make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            )

    def contents(self, scheme: dict[str, Any] = SCHEMES[0]) -> Contents:
        """Parts and objects under the names of a scheme.

        Raises:
            UserError: A weight has no row in the weight table.
        """
        parts: list[Part] = []
        objects: list[str] = []
        with collector_paused():
            for name, entry in self._model.sharded_state_dict(metadata=dict(scheme)).items():
                if isinstance(entry, ShardedObject):
                    objects.append(entry.unique_key)
                else:
                    parts += self._parts(name, entry)
        return Contents(tuple(parts), tuple(objects))

    def _parts(self, name: str, entry: ShardedTensor | ShardedTensorFactory) -> Iterator[Part]:
        whole = entry.data
        placement = self._table.place(Weight(*parse_name(name), whole))
        stored = [entry] if isinstance(entry, ShardedTensor) else list(nested_values(entry.build()))
        for tensor in stored:
            start, rows = tensor.data.storage_offset() // whole.stride(0), tensor.data.shape[0]
            if tuple(tensor.data.shape[1:]) != tuple(whole.shape[1:]):
                raise UserError(f"{tensor.key}: Megatron stores it split along another dimension than its rows")
            yield Part(
                tensor.key,
                tuple(tensor.global_shape),
                tuple(tensor.global_offset),
                (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape),
                placement if rows == whole.shape[0] else placement.narrowed(start, rows),
                float32=whole.dtype != _MODEL_DTYPE,
            )
