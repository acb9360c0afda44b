"""A real SGLang server with an API key: who has it, and that nobody else sees it."""

import asyncio
import secrets
from pathlib import Path

import httpx
import psutil
import pytest

from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.protocol import ServerError
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.server import SGLangServer
from tests.e2e.conftest import VOCAB_SIZE
from tests.tiny_models import make_tiny_qwen3_moe


def generate(server: SGLangServer, key: str | None) -> int:
    async def run() -> int:
        client = SGLangClient(server.url, vocab_size=VOCAB_SIZE, api_key=key)
        try:
            return len((await client.generate([3, 4], SamplingParams(4, ignore_eos=True))).response_ids)
        finally:
            await client.close()

    return asyncio.run(run())


def test_a_key_is_needed_for_everything_but_health_and_is_nowhere_to_be_read(tmp_path: Path) -> None:
    key = secrets.token_urlsafe(32)
    model = make_tiny_qwen3_moe(tmp_path / "model", vocab_size=VOCAB_SIZE)
    with SGLangServer(model, tmp_path / "server.log", api_key=key) as server:
        server.wait_ready()
        for wrong in (None, "wrong"):
            with SGLangControl(server.url, api_key=wrong) as control:
                assert control.ready() and control.health()
                with pytest.raises(ServerError, match="401"):
                    control.update_weights_from_disk(model, version=1)
                with pytest.raises(ServerError, match="401"):
                    control.pause_generation()
            with pytest.raises(ServerError, match="401"):
                generate(server, wrong)
        # Each route without the client, which asks for the server's limits first.
        for route in ("/generate", "/update_weights_from_tensor", "/init_weights_update_group", "/server_info"):
            assert httpx.post(server.url + route, json={}, trust_env=False).status_code == 401, route
        with SGLangControl(server.url, api_key=key) as control:
            control.update_weights_from_disk(model, version=1)
            assert control.weight_version() == 1
        assert generate(server, key) == 4

        assert server.pid is not None
        processes = psutil.Process(server.pid).children(recursive=True)
        assert processes and not any(key in word for process in processes for word in process.cmdline())
    log = (tmp_path / "server.log").read_text()
    assert key not in log and "'api_key': '<key>'" in log
