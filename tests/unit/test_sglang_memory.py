"""Memory that two processes open: what CUDA's tuple becomes on the way, and a file in memory in its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vespo.errors import UserError
from megatron_vespo.sglang_weights import memory
from megatron_vespo.sglang_weights.memory import SharedBuffer, device_key, open_shared
from megatron_vespo.weight_sync.tensor import check_allocator

CPU = torch.device("cpu")


def test_what_one_writes_the_other_reads_and_cannot_change() -> None:
    buffer = SharedBuffer(100, CPU)
    buffer.flat.copy_(torch.arange(100))
    handles = json.loads(json.dumps({device_key(CPU): buffer.handle()}))
    seen = open_shared(handles, CPU)
    assert torch.equal(seen, buffer.flat)
    seen += 1
    assert torch.equal(buffer.flat, torch.arange(100, dtype=torch.uint8))
    path = Path(buffer.handle()[0])
    assert path.readlink().name.startswith("memfd:megatron_vespo"), "it has no name that could outlive its processes"
    assert path.parent.stat().st_mode & 0o077 == 0, "of nobody else"
    buffer.close()
    assert not path.exists()


def test_another_process_reads_it() -> None:
    buffer = SharedBuffer(3, CPU)
    buffer.flat.copy_(torch.tensor([7, 8, 9]))
    path, size = buffer.handle()
    read = [sys.executable, "-c", "import sys; print(list(open(sys.argv[1], 'rb').read()))", path]
    assert subprocess.run(read, capture_output=True, text=True).stdout == "[7, 8, 9]\n" and size == 3
    buffer.close()


def test_a_device_that_no_rank_shares_is_named() -> None:
    with pytest.raises(ValueError, match=r"cpu of .*, only of GPU-1, GPU-2"):
        open_shared({"GPU-1": [], "GPU-2": []}, CPU)


def test_cudas_handle_survives_the_way() -> None:
    """As ``_share_cuda_`` gives it: numbers, bytes of any value, a flag."""
    parts = (3, bytes(range(256)), 2**40, 512, b"/torch_1", 7, b"\xff\x00", True)
    sent = json.loads(json.dumps([memory._text(part) for part in parts]))
    assert tuple(memory._bytes(part) for part in sent) == parts


def test_expandable_segments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_allocator(torch.device("cuda"))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True")
    check_allocator(CPU)
    with pytest.raises(UserError, match="expandable segments"):
        check_allocator(torch.device("cuda"))
