"""Between Hugging Face folders and Megatron ``torch_dist`` checkpoints, a tensor at a time.

Neither direction holds the model: each part is read, put in the other's order by the family's weight table and written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

import torch

from megatron_vespo.checkpoint_folder import TRACKER, iteration_name, write_tracker
from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_folder
from megatron_vespo.models.conversion import check_source, check_unread, read_into, some
from megatron_vespo.models.hf_config import Architecture
from megatron_vespo.models.hf_files import HfReader, HfWriter, copy_companions
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.models.torch_dist import SCHEMES, Contents, Part, TorchDistModel
from megatron_vespo.models.torch_dist_files import TorchDistReader, write_torch_dist
from megatron_vespo.platform.collector import collector_paused

Progress = Callable[[str, int, int], None]
"""(what is done, bytes done, bytes in all), once for each tensor."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _silent(what: str, done: int, total: int) -> None:
    return None


def hf_to_torch_dist(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    iteration: int | None = None,
    make_vocab_size_divisible_by: int = 128,
    file_bytes: int = 2**30,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> None:
    """Write a Hugging Face folder as a Megatron checkpoint. Needs Megatron's process groups, of one rank.

    Args:
        source: Hugging Face folder.
        target: Folder of checkpoints to make; it appears when it is complete.
        dtype: Of the weights; None keeps what is stored. What Megatron keeps in float32 stays as stored.
        iteration: None makes a ``release``.
        make_vocab_size_divisible_by: The vocabulary is padded to a multiple; Megatron ignores a different padding.
        file_bytes: Size of the files.
        overwrite: Whether to replace a checkpoint at ``target``, and all that lies beside it there.
        progress: Told of each tensor.

    Raises:
        UserError: The architecture or a tensor does not fit, ``target`` exists, or writing failed.
    """
    _check_target(target, source, overwrite)
    architecture, reader = load_architecture(source), HfReader(source)
    contents = TorchDistModel(architecture, make_vocab_size_divisible_by).contents()
    _check_hf(contents, architecture, reader)
    parts = [(part, _hf_dtype(part, reader, dtype)) for part in contents.parts]
    dtypes = {(part.key, part.offset): kind for part, kind in parts}
    total = sum(part.numel * kind.itemsize for part, kind in parts)
    done = 0

    def make(part: Part) -> torch.Tensor:
        nonlocal done
        tensor = _read_hf(part, reader, dtypes[part.key, part.offset])
        done += tensor.nbytes
        progress("writing", done, total)
        return tensor.view(part.shape)

    common = {"checkpoint_version": 3.0, "iteration": iteration or 0, "content_metadata": SCHEMES[0]}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target) as temporary, collector_paused():
            folder = temporary / iteration_name(iteration)
            folder.mkdir()
            write_torch_dist(folder, parts, contents.objects, common, make, file_bytes)
            write_tracker(temporary, iteration)
    except OSError as error:
        raise UserError(f"writing {target} failed: {error}") from error


def torch_dist_to_hf(
    source: Path,
    target: Path,
    companions: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
    progress: Progress = _silent,
) -> None:
    """Write a Megatron checkpoint as a Hugging Face folder. Needs Megatron's process groups, of one rank.

    Args:
        source: Checkpoint, or a folder of checkpoints, of which the newest is taken. Saved at any parallelism.
        target: Hugging Face folder to make; it appears when it is complete.
        companions: Hugging Face folder that config.json, generation config and tokenizer are copied from.
        dtype: Of the weights; None keeps what is stored. What Megatron keeps in float32 stays as stored.
        shard_bytes: Size of the safetensors files.
        overwrite: Whether to replace a Hugging Face folder at ``target``, and all that lies beside it there.
        progress: Told of each tensor.

    Raises:
        UserError: The architecture or a tensor does not fit, ``target`` exists, or writing failed.
    """
    _check_target(target, source, overwrite)
    _check_target(target, companions, overwrite)
    checkpoint = TorchDistReader(source)
    contents = _contents(load_architecture(companions), checkpoint)
    total = sum(part.numel * checkpoint.dtype(part.key).itemsize for part in contents.parts)
    done = 0
    written: dict[torch.dtype, int] = {}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(target) as temporary, collector_paused():
            copy_companions(companions, temporary)
            writer = HfWriter(temporary, shard_bytes)
            for tensors in _hf_tensors(contents, checkpoint, dtype):
                writer.add(tensors.items())
                for tensor in tensors.values():
                    written[tensor.dtype] = written.get(tensor.dtype, 0) + tensor.numel()
                    done += tensor.numel() * tensor.itemsize
                progress("writing", min(done, total), total)
            writer.finish()
            _state_dtype(temporary / "config.json", max(written, key=lambda kind: written[kind]))
    except OSError as error:
        raise UserError(f"writing {target} failed: {error}") from error


def verify(hf: Path, megatron: Path, *, dtype: torch.dtype | None, written: str, progress: Progress = _silent) -> None:
    """Read both folders again and compare them bit by bit.

    Args:
        hf: Hugging Face folder.
        megatron: Megatron checkpoint.
        dtype: As for the conversion.
        written: Which of the two was written from the other: ``hf`` or ``megatron``.
        progress: Told of each tensor.

    Raises:
        UserError: It names the first tensor that differs, or cannot be read.
    """
    architecture, reader, checkpoint = load_architecture(hf), HfReader(hf), TorchDistReader(megatron)
    contents = _contents(architecture, checkpoint)
    _check_hf(contents, architecture, reader)
    total, done = sum(part.numel for part in contents.parts), 0
    with collector_paused():
        for part in contents.parts:
            ours = checkpoint.read(part)
            theirs = _read_hf(part, reader, _hf_dtype(part, reader, None))
            source, target = (theirs, ours) if written == "megatron" else (ours, theirs)
            wanted = source.to(_chosen(part, source.dtype, dtype))
            if wanted.dtype != target.dtype or not torch.equal(_bits(wanted), _bits(target)):
                raise UserError(f"{hf} and {megatron} differ in {', '.join(part.placement.names)}")
            done += part.numel
            progress("comparing", done, total)


def _hf_tensors(
    contents: Contents, checkpoint: TorchDistReader, dtype: torch.dtype | None
) -> Iterator[dict[str, torch.Tensor]]:
    """HF tensors of one Megatron weight after the other."""
    for names, parts in groupby(contents.parts, key=lambda part: part.placement.names):
        tensors: dict[str, torch.Tensor] = {}
        for part in parts:
            data = checkpoint.read(part)
            data = data.to(_chosen(part, data.dtype, dtype))
            dim = part.placement.layout.dim
            for piece in part.placement.pieces:
                rows, shape = data.narrow(dim, piece.start, piece.rows), part.placement.hf_shape(piece.hf)
                name = names[piece.hf]
                if rows.shape == shape:  # all of it: no copy
                    tensors[name] = rows
                    continue
                if name not in tensors:
                    tensors[name] = torch.empty(shape, dtype=data.dtype)
                tensors[name].narrow(dim, piece.hf_start, piece.rows).copy_(rows)
        yield tensors


def _contents(architecture: Architecture, checkpoint: TorchDistReader) -> Contents:
    """The architecture's parts under the names that the checkpoint has, without padding.

    Raises:
        UserError: Tensors are missing, or have another shape, or are none of this architecture.
    """
    model = TorchDistModel(architecture)
    stored = {key for key in checkpoint.tensors if "optimizer." not in key and "rng_state" not in key}
    latent = bool(architecture.transformer_config().get("multi_latent_attention"))
    candidates = [model.contents(scheme) for scheme in SCHEMES]
    for contents in (*candidates, *(contents.of_local_layers(latent) for contents in candidates)):
        if {part.key for part in contents.parts} <= stored:
            break
    else:
        missing = {part.key for part in candidates[0].parts} - stored
        raise UserError(f"{checkpoint.folder}: has no {some(missing)}; config.json in {architecture.source} wants it")
    extra = stored - {part.key for part in contents.parts}
    if extra:
        raise UserError(f"{checkpoint.folder}: {some(extra)}: not weights of the config.json in {architecture.source}")
    parts = tuple(part.without_padding() for part in contents.parts)
    for part in parts:
        _check_stored(part, checkpoint, architecture)
    return Contents(parts, contents.objects)


def _check_stored(part: Part, checkpoint: TorchDistReader, architecture: Architecture) -> None:
    size, wanted = tuple(checkpoint.tensors[part.key].size), part.global_shape
    if part.placement.layout.padded:
        axis = len(part.shape) - len(part.placement.shape)
        fits = len(size) == len(wanted) and size[axis] >= part.shape[axis] and size[axis + 1 :] == wanted[axis + 1 :]
    else:
        fits = size == wanted
    if not fits:
        raise UserError(
            f"{checkpoint.folder}: {part.key} has shape {size}, config.json in {architecture.source} says {wanted}"
        )


def _check_hf(contents: Contents, architecture: Architecture, reader: HfReader) -> None:
    read: set[str] = set()
    for part in contents.parts:
        if not read.issuperset(part.placement.names):
            check_source(part.placement, reader)
            read.update(part.placement.names)
    check_unread(frozenset(read), architecture, reader)


def _read_hf(part: Part, reader: HfReader, dtype: torch.dtype) -> torch.Tensor:
    placement = part.placement
    pieces, dim = placement.pieces, placement.layout.dim
    if len(pieces) == 1 and pieces[0].rows == placement.shape[dim]:  # as it lies in the file: no copy
        (piece,) = pieces
        return reader.read(placement.names[piece.hf], dim, piece.hf_start, piece.rows).to(dtype).contiguous()
    tensor = torch.empty(placement.shape, dtype=dtype)
    read_into(tensor, placement, reader)
    return tensor


def _hf_dtype(part: Part, reader: HfReader, dtype: torch.dtype | None) -> torch.dtype:
    stored = [reader.dtype(name) for name in part.placement.names]
    widest = stored[0]
    for other in stored[1:]:
        widest = torch.promote_types(widest, other)
    return _chosen(part, widest, dtype)


def _chosen(part: Part, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return stored if dtype is None or part.float32 else dtype


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Compared as bytes: a NaN equals itself, and 0 is not -0."""
    return tensor.contiguous().view(torch.uint8)


def _state_dtype(config: Path, dtype: torch.dtype) -> None:
    """Let config.json name the dtype of the weights, which is what readers load them in; else it stays untouched."""
    raw = json.loads(config.read_text(encoding="utf-8"))
    field = "torch_dtype" if "torch_dtype" in raw else "dtype"
    name = str(dtype).removeprefix("torch.")
    if raw.get(field) != name:
        config.write_text(json.dumps({**raw, field: name}, indent=2) + "\n", encoding="utf-8")


def _check_target(target: Path, source: Path, overwrite: bool) -> None:
    """Refuse to write over the source, over anything without being told to, and over what is no checkpoint at all."""
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{target}: exists; give another folder, or --overwrite to replace it")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise UserError(f"{target}: holds the source {source}; give another folder")
    known = (target / TRACKER).is_file() or (target / "config.json").is_file()
    if not known and any(target.iterdir()):
        raise UserError(f"{target}: is no checkpoint, so --overwrite does not replace it; remove it yourself")
