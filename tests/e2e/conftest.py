"""One real SGLang server for each process of a test session; the first test that wants it waits for its start."""

from collections.abc import Iterator

import pytest

from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.server import SGLangServer
from tests.tiny_models import make_tiny_qwen3_moe

VOCAB_SIZE = 64


@pytest.fixture(scope="session")
def sglang_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """The ready server. Tests may change its weights: those that care push their own first."""
    folder = tmp_path_factory.mktemp("server")
    server = SGLangServer(
        make_tiny_qwen3_moe(folder / "model", vocab_size=VOCAB_SIZE), folder / "server.log", random_seed=1
    )
    server.start()
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def control(sglang_server: SGLangServer) -> Iterator[SGLangControl]:
    with SGLangControl(sglang_server.url) as control:
        yield control
