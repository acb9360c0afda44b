import asyncio
import base64
import math
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from scripted import Break, Requests, Status, answer, use_client, with_client

from megatron_vespo.errors import UserError
from megatron_vespo.rollout import client as client_module
from megatron_vespo.rollout.client import SGLangClient
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.protocol import Generation, ServerError, ServerGoneError, TensorList
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import UNKNOWN_EXPERT

SAMPLING = SamplingParams(10)


def generate(result: Any, ids: list[int] | None = None, sampling: SamplingParams = SAMPLING) -> Generation:
    return with_client(lambda body: result, lambda client: client.generate([1, 2] if ids is None else ids, sampling))


def test_ids_log_probs_and_versions_come_back() -> None:
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}]
    response = generate(answer([7, 8, 9], log_probs=[-1, -2, -3], spans=spans, reason="length"))
    assert response.response_ids.tolist() == [7, 8, 9] and response.response_ids.dtype == np.int32
    assert response.log_mu.tolist() == [-1, -2, -3] and response.log_mu.dtype == np.float32
    assert response.weight_versions.tolist() == [3, 4, 4] and response.weight_versions.dtype == np.int32
    assert response.finish_reason == "length"


def routed(
    experts: np.ndarray | None, spans: list[dict[str, Any]] | None = None, requests: Requests | None = None
) -> Any:
    result = answer([7, 8, 9], spans=spans)
    if experts is not None:
        result["meta_info"]["routed_experts"] = base64.b64encode(experts.astype(np.int32).tobytes()).decode()
    generation = with_client(
        lambda body: result, lambda client: client.generate([1, 2, 3, 4], SAMPLING), requests, routing=(2, 2)
    )
    return generation.routed_experts


def test_chosen_experts_come_back() -> None:
    experts = np.arange(12).reshape(3, 2, 2)
    requests: Requests = []
    found = routed(experts, requests=requests)
    assert found.dtype == np.int16 and found.tolist() == experts.tolist()
    assert requests[0]["return_routed_experts"] is True and requests[0]["routed_experts_start_len"] == 3
    assert generate(answer([7])).routed_experts is None
    assert (routed(None) == UNKNOWN_EXPERT).all() and routed(None).shape == (3, 2, 2)
    with pytest.raises(ServerError, match="8 chosen experts, not 3 x 2 x 2"):
        routed(experts[:2])


def test_what_a_push_may_have_had_computed_again_is_not_known() -> None:
    spans = [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}]
    found = routed(np.arange(12).reshape(3, 2, 2), spans)
    assert (found[:2] == UNKNOWN_EXPERT).all() and found[2].tolist() == [[8, 9], [10, 11]]


def test_weights_that_nobody_pushed_have_the_version_they_are_said_to_have() -> None:
    def versions(*names: str) -> list[int]:
        spans = [{"version": name, "start": i, "end": i + 1} for i, name in enumerate(names)]
        result = answer([5] * len(names), spans=spans)
        generate = with_client(lambda body: result, lambda client: client.generate([1], SAMPLING), unpushed_version=0)
        return generate.weight_versions.tolist()

    assert versions("default", "2", "default") == [0, 2, 0]
    with pytest.raises(ServerError, match="version 'defaults', not a policy version"):
        versions("defaults")


def test_every_sampling_parameter_is_said() -> None:
    requests: Requests = []
    sampling = SamplingParams(5, temperature=0.5, stop_token_ids=(9,), ignore_eos=True)
    with_client(lambda body: answer([1]), lambda client: client.generate([1], sampling), requests)
    sent = requests[0]
    assert sent["input_ids"] == [1] and sent["return_logprob"] is True
    said = sent["sampling_params"]
    assert said["temperature"] == 0.5 and said["stop_token_ids"] == [9] and said["ignore_eos"] is True
    assert (said["top_p"], said["top_k"], said["min_p"], said["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)


@pytest.mark.parametrize(
    ("ids", "limit", "message"),
    [
        ([], 10, "no token ids"),
        ([1, 32], 10, r"token id 32 is outside the vocabulary of 32"),
        ([-1, 3], 10, r"token id -1 is outside"),
        ([1] * 58, 1, r"58 prompt tokens .*takes 57 prompt tokens"),
        ([1] * 10, 53, r"10 prompt tokens \+ max_new_tokens 53 .*62 in all"),
    ],
)
def test_bad_requests_are_not_sent(ids: list[int], limit: int, message: str) -> None:
    requests: Requests = []
    with pytest.raises(UserError, match=message):
        with_client(lambda body: answer([1]), lambda client: client.generate(ids, SamplingParams(limit)), requests)
    assert requests == []


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (answer([1, 2], log_probs=[-1, None]), "not finite"),
        (answer([1], version="default"), r"version 'default', not a policy version: push weights"),
        (answer([1, 2], spans=[{"version": "1", "start": 0, "end": 1}]), "do not cover the 2 tokens"),
        (answer([1, 2], spans=[{"version": "1", "start": 1, "end": 2}]), "do not cover"),
        (answer([1, 2], spans=[]), "do not cover"),
        (answer([1], reason="tired"), "unknown finish reason"),
        (answer([1]) | {"output_ids": [2]}, "or of other tokens"),
        (answer([1]) | {"output_ids": [1, 1]}, "2 tokens but log-probabilities of 1"),
        (Status(400, '{"error": {"message": "too long"}}'), r"/generate failed with status 400: too long"),
        (Status(500, "Internal"), r"failed with status 500: Internal"),
    ],
)
def test_bad_answers_are_named(result: Any, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        generate(result)


def test_an_empty_response_is_fine() -> None:
    assert len(generate(answer([], spans=[], reason="abort")).response_ids) == 0


@pytest.fixture
def vacant() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_server_that_hangs_is_named() -> None:
    ended = threading.Event()

    def hang(body: Any) -> Any:
        ended.wait(30)
        return answer([1])

    async def use(client: SGLangClient) -> str:
        with pytest.raises(ServerGoneError, match=r"/generate: no answer in time \(.*\)") as caught:
            await client.generate([1], SAMPLING)
        ended.set()
        return str(caught.value).removeprefix(client.base_url)

    requests: Requests = []
    assert with_client(hang, use, requests, timeout=0.5).startswith("/generate")
    assert len(requests) == 1


def test_scores_drop_the_unscored_position() -> None:
    requests: Requests = []
    result = {"meta_info": {"input_token_logprobs": [[None, 2, None], [-0.1, 3, None], [-0.2, 4, None]]}}
    scores = with_client(lambda body: result, lambda client: client.score([1, 2, 3, 4], start=2), requests)
    np.testing.assert_allclose(scores, [-0.1, -0.2])
    assert requests[0]["logprob_start_len"] == 1
    with pytest.raises(UserError, match="start 0"):
        with_client(lambda body: result, lambda client: client.score([1, 2], start=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.9}, r"top_p: 0.9 cannot be trained on, leave it 1.0: .*evaluation only"),
        ({"top_k": 40}, r"top_k: 40 cannot be trained on"),
        ({"temperature": 0}, r"greedy\) cannot be trained on"),
    ],
)
def test_sampling_that_is_wrong_or_cannot_be_trained_on(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**({"max_new_tokens": 1} | arguments))


def test_evaluation_may_cut_the_distribution() -> None:
    SamplingParams(1, temperature=0, top_p=0.9, top_k=5, evaluation=True)


def test_control_sends_versions_as_text_and_flushes() -> None:
    seen: list[tuple[str, bytes]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, request.content))
        return httpx.Response(200, json={"success": True})

    with SGLangControl("http://server:1/", transport=httpx.MockTransport(handle)) as control:
        control.pause_generation()
        control.update_weights_from_distributed(TensorList(["w"], ["float32"], [[2, 3]]), "push", version=7)
        control.continue_generation()
    assert [path for path, _ in seen] == [
        "/pause_generation",
        "/update_weights_from_distributed",
        "/continue_generation",
    ]
    assert b'"retract"' in seen[0][1] and b'"weight_version":"7"' in seen[1][1] and b'"flush_cache":true' in seen[1][1]


def test_no_request_may_take_longer_than_control_says() -> None:
    seen: dict[str, float] = {}

    def handle(request: httpx.Request) -> httpx.Response:
        seen[request.url.path] = request.extensions["timeout"]["read"]
        return httpx.Response(200, json={"success": True, "weight_version": "1"})

    for timeout, quick in ((600.0, 60.0), (7.0, 7.0)):
        seen.clear()
        with SGLangControl("http://server:1", timeout=timeout, transport=httpx.MockTransport(handle)) as control:
            control.begin_weight_update()
            control.pause_generation()
            control.weight_version()
        assert seen == {"/begin_weight_update": timeout, "/pause_generation": quick, "/model_info": quick}


def test_control_raises_on_success_false() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"success": False, "message": "no group"}))
    with SGLangControl("http://server:1", transport=transport) as control:
        with pytest.raises(ServerError, match="http://server:1/end_weight_update failed with status 200: no group"):
            control.end_weight_update()
        assert not control.ready()


@pytest.mark.parametrize(
    "broken",
    [
        Break(),
        Break(reset=True),
        Break(b"HTTP/1.1 200 OK\r\nContent-Le"),
        Break(b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{"),
        Break(b"\0\0\0\0"),
    ],
    ids=["closed", "reset", "half a header", "half a body", "no HTTP"],
)
def test_a_broken_connection_is_tried_again_up_to_a_limit(broken: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "CONNECTION_RETRY_SECONDS", 0.01)
    requests: Requests = []

    def breaks_twice(body: dict[str, Any]) -> Any:
        return broken if len(requests) <= 2 else answer([7])

    response = with_client(breaks_twice, lambda client: client.generate([1], SAMPLING), requests)
    assert response.response_ids.tolist() == [7] and len(requests) == 3

    requests.clear()
    with pytest.raises(ServerGoneError, match=r"^http://127.0.0.1:\d+/generate: the server is gone or unreachable \("):
        with_client(lambda body: broken, lambda client: client.generate([1], SAMPLING), requests)
    assert len(requests) == client_module.CONNECTION_ATTEMPTS


def test_a_server_that_is_gone_is_not_tried_again(vacant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "CONNECTION_RETRY_SECONDS", 600)

    async def use(client: SGLangClient) -> None:
        with pytest.raises(
            ServerGoneError, match=rf"^{vacant}/model_info: .*gone or unreachable \(ClientConnectorError"
        ):
            await asyncio.wait_for(client.generate([1], SAMPLING), 60)

    use_client(vacant, use)


def test_proxies_of_the_environment_are_not_used(vacant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, vacant)
    assert generate(answer([7])).response_ids.tolist() == [7]


def test_as_many_requests_are_in_flight_as_asked_for() -> None:
    n, lock = 120, threading.Lock()  # aiohttp alone would stop at 100
    now, most = 0, 0
    full = threading.Event()

    def count(body: Any) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            if now == n:
                full.set()
        full.wait(30)
        with lock:
            now -= 1
        return answer([7])

    async def use(client: SGLangClient) -> None:
        await asyncio.gather(*[client.generate([1], SAMPLING) for _ in range(2 * n)])

    with_client(count, use, max_concurrent=n)
    assert most == n
