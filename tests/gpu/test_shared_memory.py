"""Two processes share memory of one GPU, as trainer and server do where they take turns on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_vespo import platform
from megatron_vespo.sglang_weights.memory import SharedBuffer, device_key
from tests.gpu.place import Place

READER = """
import json, sys
import torch
from megatron_vespo.sglang_weights.memory import open_shared
device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
for line in sys.stdin:
    shared = open_shared(json.loads(line), device)
    print(json.dumps([shared.device.type, shared.numel(), int(shared.sum()), int(shared[-1])]), flush=True)
    del shared
"""


def write_and_ask() -> list[list[object]]:
    """What another process reads of a buffer, and again when it has been written to."""
    device = platform.device()
    buffer = SharedBuffer(5_000_001, device)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    reader = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", READER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdin is not None and reader.stdout is not None
    answers = []
    for value in (1, 3):
        buffer.flat.fill_(value)
        buffer.flat[-1] = 100 + value
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        reader.stdin.write(json.dumps({device_key(device): buffer.handle()}) + "\n")
        reader.stdin.flush()
        answers.append(json.loads(reader.stdout.readline()))
    reader.stdin.close()
    assert reader.wait(60) == 0
    buffer.close()
    return answers


def test_another_process_reads_what_was_written(place: Place) -> None:
    kind = "cpu" if place.rehearsal else "cuda"
    assert place.run(write_and_ask) == [
        [kind, 5_000_001, 5_000_000 + 101, 101],
        [kind, 5_000_001, 3 * 5_000_000 + 103, 103],
    ]
