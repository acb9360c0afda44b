"""Skips these tests where there is no GPU; ``pytest tests/gpu --rehearse`` tries them on a CPU instead."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.gpu.place import Place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rehearse", action="store_true", help="run the GPU tests on a CPU, with the local spec and emulated FP8"
    )


@pytest.fixture(scope="session")
def place(pytestconfig: pytest.Config) -> Place:
    """Where to run; skips the test where that is nowhere."""
    if pytestconfig.getoption("--rehearse", default=False):
        return Place("local", rehearsal=True)
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:  # OSError: a shared library is missing
        pytest.skip(f"needs Transformer Engine: {error}")
    return Place("transformer_engine", rehearsal=False)
