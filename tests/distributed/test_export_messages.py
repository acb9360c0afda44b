"""How many messages and buckets the export of a model with very many tensors takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import safe_open

from megatron_vespo import parallel
from megatron_vespo.models.export import HfExporter, shapes_of
from megatron_vespo.models.registry import load_architecture
from tests.policies import load_model
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

EP2 = {"expert_model_parallel_size": 2}
MEBIBYTE = 2**20
COMMUNICATION = (
    *("send", "recv", "isend", "irecv", "batch_isend_irecv", "broadcast", "scatter", "gather", "reduce"),
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter", "reduce_scatter_tensor"),
    *("all_to_all", "all_to_all_single", "all_gather_object", "gather_object", "broadcast_object_list", "barrier"),
)


def count_calls(counts: Counter[str]) -> None:
    """From now on, in this process."""
    for name in COMMUNICATION:
        original = getattr(dist, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        setattr(dist, name, counted)


def export(folder: Path, bucket_bytes: int) -> tuple[Counter[str], int, int, int]:
    """Messages of one stream, tensors, buckets, bytes of the largest bucket."""
    exporter = HfExporter(load_model(folder, EP2), load_architecture(folder), bucket_bytes)
    counts: Counter[str] = Counter()
    count_calls(counts)
    names: set[str] = set()
    sizes = []
    for bucket in exporter.stream():
        names.update(name for name, _ in bucket)
        sizes.append(sum(tensor.nbytes for _, tensor in bucket))
    if parallel.is_main():
        assert shapes_of(exporter).keys() == names
    return counts, len(names), len(sizes), max(sizes)


def test_a_push_of_18867_tensors_takes_few_messages(tmp_path: Path) -> None:
    folder = make_tiny_qwen3_moe(
        tmp_path / "model",
        num_layers=48,
        num_experts=128,
        num_experts_per_tok=8,
        hidden_size=32,
        moe_intermediate_size=16,
    )
    with safe_open(folder / "model.safetensors", "np") as file:
        tensors = len(file.keys())
    assert tensors == 18_867
    receiver, sender = run_ranks(2, export, folder, 16 * MEBIBYTE, **EP2)
    assert receiver[1] == tensors
    total = receiver[0].total()
    assert 0 < total < 10 and sender[0].total() == total, (receiver[0], sender[0])
    assert receiver[2] == sender[2] >= 3 and receiver[3] <= 16 * MEBIBYTE
