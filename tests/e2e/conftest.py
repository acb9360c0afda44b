"""One real SGLang server for the session, started as soon as it is known that a test wants it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.server import SGLangServer
from tests.tiny_models import make_tiny_qwen3_moe

SERVER = pytest.StashKey[SGLangServer]()
FIXTURE = "sglang_server"
VOCAB_SIZE = 64


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    wanted = any(FIXTURE in getattr(item, "fixturenames", ()) for item in session.items)
    if not wanted or session.config.option.collectonly:
        return
    folder = Path(session.config._tmp_path_factory.mktemp("server"))  # type: ignore[attr-defined]
    model = make_tiny_qwen3_moe(folder / "model", vocab_size=VOCAB_SIZE)
    # SGLang's imports take most of a minute: they run while the tests before import what they need.
    server = SGLangServer(model, folder / "server.log", random_seed=1)
    server.start()
    session.stash[SERVER] = server


def pytest_sessionfinish(session: pytest.Session) -> None:
    if SERVER in session.stash:
        session.stash[SERVER].stop()


@pytest.fixture(scope="session")
def sglang_server(request: pytest.FixtureRequest) -> SGLangServer:
    """The ready server. Tests may change its weights: those that care push their own first."""
    server = request.session.stash[SERVER]
    server.wait_ready()
    return server


@pytest.fixture
def control(sglang_server: SGLangServer) -> Iterator[SGLangControl]:
    with SGLangControl(sglang_server.url) as control:
        yield control
