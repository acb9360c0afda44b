"""Weights pushed while requests are in flight, in each way of pausing them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo import parallel
from megatron_vespo.models.export import HfExporter
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import PauseMode, SGLangControl
from megatron_vespo.rollout.dispatch import Dispatcher
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.generation import generate_to_end
from megatron_vespo.rollout.protocol import Generation
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.types import FloatArray
from megatron_vespo.weight_sync.broadcast import BroadcastTransport
from megatron_vespo.weight_sync.servers import Servers
from megatron_vespo.weight_sync.sync import WeightSync
from tests.e2e.conftest import VOCAB_SIZE
from tests.policies import load_model
from tests.ranks import run_ranks
from tests.tiny_models import make_tiny_qwen3_moe

PROMPT, TOKENS, REQUESTS = [3, 4, 5], 300, 8


def push_in_flight(url: str, models: list[Path], pause: PauseMode) -> tuple[list[Generation], list[FloatArray]]:
    """Responses during which the second model's weights replaced the first one's; their scores under the second."""
    flush = pause != "in_place"

    def open_member(url: str) -> tuple[SGLangControl, SGLangClient]:
        return SGLangControl(url, flush_cache=flush), SGLangClient(url, vocab_size=VOCAB_SIZE)

    fleet, servers = Fleet(lambda: [url], open_member), Servers()
    fleet.meet()
    syncs = [
        WeightSync(
            HfExporter(load_model(model, {}), load_architecture(model), 2**20),
            fleet,
            servers,
            BroadcastTransport(servers),
            pause=pause,
        )
        for model in models
    ]
    syncs[0].push(5)
    begun = threading.Event()

    async def use() -> tuple[list[Generation], list[FloatArray]]:
        dispatcher = Dispatcher(fleet, concurrency=64, cache_by_version=not flush)
        sampling = SamplingParams(TOKENS, ignore_eos=True)
        tasks = [asyncio.create_task(generate_to_end(dispatcher.route(), PROMPT, sampling)) for _ in range(REQUESTS)]
        await asyncio.sleep(0.5)
        begun.set()
        responses = await asyncio.gather(*tasks)
        pushed.wait(60)
        (member,) = fleet.members
        if not flush:
            await asyncio.to_thread(member.control.flush_cache)
        scores = [await member.client.score([*PROMPT, *r.response_ids], start=len(PROMPT)) for r in responses]
        await dispatcher.close()
        return responses, scores

    pushed = threading.Event()
    result: list[tuple[list[Generation], list[FloatArray]]] = []
    thread = threading.Thread(target=lambda: result.append(asyncio.run(use())))
    thread.start()
    begun.wait(60)
    syncs[1].push(6)
    pushed.set()
    thread.join()
    syncs[0].close()
    parallel.barrier()
    return result[0]


@pytest.mark.parametrize("pause", ["retract", "abort", "in_place"])
def test_a_response_spans_versions(sglang_server: SGLangServer, tmp_path: Path, pause: PauseMode) -> None:
    other = make_tiny_qwen3_moe(tmp_path / "other", seed=1, vocab_size=VOCAB_SIZE)
    models = [sglang_server.model_path, other]
    ((responses, scores),) = run_ranks(1, push_in_flight, sglang_server.url, models, pause)
    errors = []
    for response, score in zip(responses, scores, strict=True):
        assert len(response.response_ids) == TOKENS and response.finish_reason == "length"
        changed = int(np.argmax(response.weight_versions == 6))
        assert 0 < changed < TOKENS, "every response has tokens of both versions"
        assert (response.weight_versions[:changed] == 5).all() and (response.weight_versions[changed:] == 6).all()
        errors.append(np.abs(response.log_mu - score)[changed + 1 :].max())
    if pause == "in_place":
        assert max(errors) > 1e-2, "keys and values of the old weights are used on"
    else:
        assert max(errors) < 1e-4, "tokens after the push are exactly the new policy's"
