"""The rollout floor against the real SGLang."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from megatron_vespo.data.prompts import PromptDataset, PromptRecord, PromptStream
from megatron_vespo.errors import UserError
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.dispatch import Dispatcher
from megatron_vespo.rollout.engine import GroupSettings, RolloutEngine
from megatron_vespo.rollout.fleet import Fleet
from megatron_vespo.rollout.generation import generate_to_end
from megatron_vespo.rollout.protocol import ServerError
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.server import SGLangServer
from megatron_vespo.rollout.service import RolloutService
from megatron_vespo.types import Sample
from tests.e2e.conftest import VOCAB_SIZE
from tests.e2e.small_runs import wait_for
from tests.tiny_models import make_tiny_qwen3_moe


def with_client(server: SGLangServer, use: Callable[[SGLangClient], Any]) -> Any:
    async def run() -> Any:
        client = SGLangClient(server.url, vocab_size=VOCAB_SIZE)
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(run())


@pytest.fixture
def pushed(sglang_server: SGLangServer, control: SGLangControl) -> SGLangServer:
    """The server with the weights it started from, as version 5."""
    control.update_weights_from_disk(sglang_server.model_path, version=5)
    return sglang_server


def test_log_probs_match_a_rescoring(pushed: SGLangServer) -> None:
    async def use(client: SGLangClient) -> None:
        prompt = [3, 4, 5, 6]
        response = await client.generate(prompt, SamplingParams(40, ignore_eos=True))
        assert len(response.response_ids) == 40 and response.finish_reason == "length"
        assert (response.weight_versions == 5).all()
        scores = await client.score([*prompt, *response.response_ids], start=len(prompt))
        np.testing.assert_allclose(response.log_mu, scores, atol=1e-4)
        # A random model of 64 tokens is uncertain, but not uniform.
        assert -np.log(VOCAB_SIZE) * 2 < response.log_mu.mean() < -1

    with_client(pushed, use)


def test_log_probs_are_of_the_scaled_distribution(pushed: SGLangServer) -> None:
    async def use(client: SGLangClient) -> None:
        prompt, temperature = [7, 8, 9], 0.7
        response = await client.generate(prompt, SamplingParams(1, temperature=temperature, ignore_eos=True))
        token = int(response.response_ids[0])
        # The whole distribution at temperature 1, one candidate at a time.
        scores = await asyncio.gather(*[client.score([*prompt, other], start=3) for other in range(VOCAB_SIZE)])
        raw = np.concatenate(scores).astype(np.float64)
        assert np.exp(raw).sum() == pytest.approx(1, abs=1e-4)
        scaled = raw / temperature - np.log(np.exp(raw / temperature).sum())
        assert response.log_mu[0] == pytest.approx(scaled[token], abs=1e-4)
        assert abs(response.log_mu[0] - raw[token]) > 1e-3

    with_client(pushed, use)


def test_samples_carry_the_version_of_their_weights(
    pushed: SGLangServer, control: SGLangControl, tmp_path: Path
) -> None:
    other = make_tiny_qwen3_moe(tmp_path / "other", seed=1, vocab_size=VOCAB_SIZE)
    prompt, sampling = [3, 4, 5], SamplingParams(6, ignore_eos=True)

    async def sample(client: SGLangClient) -> Any:
        before = await client.score([3, 4, 5, 6, 7], start=1)
        await asyncio.to_thread(control.update_weights_from_disk, other, 9)
        return before, await client.score([3, 4, 5, 6, 7], start=1), await client.generate(prompt, sampling)

    before, after, response = with_client(pushed, sample)
    assert control.weight_version() == 9 and control.info().weight_version == "9"
    assert (response.weight_versions == 9).all()
    assert np.abs(before - after).max() > 0.1


def test_a_response_spans_versions_when_weights_change_under_way(
    pushed: SGLangServer, control: SGLangControl, tmp_path: Path
) -> None:
    other = make_tiny_qwen3_moe(tmp_path / "other", seed=1, vocab_size=VOCAB_SIZE)
    prompt = [3, 4, 5]

    async def use(client: SGLangClient) -> None:
        task = asyncio.create_task(client.generate(prompt, SamplingParams(400, ignore_eos=True)))
        await asyncio.sleep(0.5)

        def push() -> None:
            control.pause_generation()
            control.begin_weight_update()
            control.update_weights_from_disk(other, version=6)
            control.end_weight_update()
            control.continue_generation()

        await asyncio.to_thread(push)
        response = await task
        changed = int(np.argmax(response.weight_versions == 6))
        assert 0 < changed < 400
        assert (response.weight_versions[:changed] == 5).all() and (response.weight_versions[changed:] == 6).all()
        scores = await client.score([*prompt, *response.response_ids], start=len(prompt))
        np.testing.assert_allclose(response.log_mu[changed:], scores[changed:], atol=1e-4)
        assert np.abs(response.log_mu[:changed] - scores[:changed]).max() > 0.1

    with_client(pushed, use)


def test_an_aborted_request_is_resumed_to_its_full_length(pushed: SGLangServer, control: SGLangControl) -> None:
    async def use(client: SGLangClient) -> None:
        prompt = [3, 4, 5]
        task = asyncio.create_task(generate_to_end(client, prompt, SamplingParams(400, ignore_eos=True)))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(control.abort_all)
        response = await task
        assert len(response.response_ids) == 400 and response.finish_reason == "length"
        scores = await client.score([*prompt, *response.response_ids], start=len(prompt))
        np.testing.assert_allclose(response.log_mu, scores, atol=1e-4)

    with_client(pushed, use)


def test_the_limits_are_what_the_server_really_generates(pushed: SGLangServer) -> None:
    async def use(client: SGLangClient) -> None:
        limits = await client.limits()
        assert limits.context_length == 512
        room = limits.max_total_tokens - 4
        response = await client.generate([5] * 4, SamplingParams(room, ignore_eos=True))
        assert len(response.response_ids) == room
        longest = await client.generate([5] * limits.max_prompt_tokens, SamplingParams(1, ignore_eos=True))
        assert len(longest.response_ids) == 1
        with pytest.raises(UserError, match=r"lower sampling\.max_new_tokens"):
            await client.generate([5] * 4, SamplingParams(room + 1))

    with_client(pushed, use)


def test_the_server_says_why_it_refuses(sglang_server: SGLangServer, control: SGLangControl, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"/update_weights_from_disk failed with status 400: Failed"):
        control.update_weights_from_disk(tmp_path, version=1)
    with pytest.raises(ServerError, match=r"(?s)/pause_generation failed with status 400: .*'abort', 'retract'"):
        control.pause_generation("slowly")  # type: ignore[arg-type]
    assert control.ready()


class ByLength:
    """Scores a response by its length."""

    async def score(self, sample: Sample) -> float:
        return float(len(sample.response_ids))


@pytest.fixture
def service(pushed: SGLangServer) -> Iterator[RolloutService]:
    records = [PromptRecord(np.asarray([3 + i, 4, 5], np.int32), str(i), {}) for i in range(8)]
    fleet = Fleet(lambda: [pushed.url], lambda url: (SGLangControl(url), SGLangClient(url, vocab_size=VOCAB_SIZE)))
    fleet.version = 5
    fleet.meet()
    engine = RolloutEngine(
        fleet,
        Dispatcher(fleet, concurrency=64),
        PromptStream(PromptDataset(records, "memory"), seed=0),
        RolloutBuffer(groups_per_batch=4, max_staleness=0),
        ByLength(),
        GroupSettings(2, SamplingParams(8), lambda ids: " ".join(map(str, ids))),
    )
    service = RolloutService(engine, lambda payload: payload or b"", lambda: None)
    service.start()
    yield service
    service.close()
    fleet.close()


def test_service_end_to_end(service: RolloutService) -> None:
    for step in range(2):
        groups = service.next_batch()
        assert [group.prompt.index for group in groups] == list(range(4 * step, 4 * step + 4))
        samples = [sample for group in groups for sample in group.samples]
        assert all(s.reward == len(s.response_ids) == len(s.text.split()) for s in samples)
        service.release()


def test_a_taken_port_is_named(sglang_server: SGLangServer, tmp_path: Path) -> None:
    second = SGLangServer(sglang_server.model_path, tmp_path / "log", port=sglang_server.port)
    with pytest.raises(UserError, match=f"port {sglang_server.port} .*is taken"):
        second.start()


def test_a_server_that_dies_at_start_up_shows_its_log(tmp_path: Path) -> None:
    model = make_tiny_qwen3_moe(tmp_path / "model")
    (model / "config.json").write_text('{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "no_such_type"}')
    with SGLangServer(model, tmp_path / "server.log") as server:
        session = server.pid
        with pytest.raises(UserError, match=r"ended with status 1; the end of its log") as caught:
            server.wait_ready()
        assert "no_such_type" in str(caught.value) and str(tmp_path / "server.log") in str(caught.value)
    assert running_in(session) == []


OWNER = """
import sys, time
from megatron_vespo.rollout.server import SGLangServer
server = SGLangServer(sys.argv[1], sys.argv[2])
server.start()
print(server.pid, flush=True)
server.wait_ready()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    model = make_tiny_qwen3_moe(tmp_path / "model")
    command = [sys.executable, "-c", OWNER, str(model), str(tmp_path / "server.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("ready", [False, True])
def test_a_killed_owner_leaves_no_orphan(owner: subprocess.Popen[str], ready: bool) -> None:
    assert owner.stdout is not None
    session = int(owner.stdout.readline())  # the guard leads a session of its own
    if ready:
        assert owner.stdout.readline() == "ready\n"
        assert len(running_in(session)) >= 4  # guard, main process, scheduler, detokenizer
    else:
        # While the children import and have not yet asked to die with their parent.
        wait_for(lambda: len(running_in(session)) >= 4, seconds=60)
    os.kill(owner.pid, signal.SIGKILL)
    wait_for(lambda: not running_in(session), seconds=10)


def running_in(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def test_a_paused_server_leaves_the_processor_to_others(sglang_server: SGLangServer, control: SGLangControl) -> None:
    def used() -> float:
        assert sglang_server.pid is not None
        times = [process.cpu_times() for process in psutil.Process(sglang_server.pid).children(recursive=True)]
        return sum(time.user + time.system for time in times)

    control.pause_generation()
    before = used()
    time.sleep(2.0)  # a poll without pause would take all of it
    after = used()
    control.continue_generation()
    assert after - before < 0.3 and control.health()
