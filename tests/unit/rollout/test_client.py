import asyncio
import math
from typing import Any

import httpx
import numpy as np
import pytest
from scripted import answer, make_client

from megatron_vespo.errors import UserError
from megatron_vespo.rollout.control import SGLangControl
from megatron_vespo.rollout.protocol import Generation, ServerError, ServerGoneError, TensorList
from megatron_vespo.rollout.sampling import SamplingParams

SAMPLING = SamplingParams(10)


def generate(result: Any, ids: list[int] | None = None, sampling: SamplingParams = SAMPLING) -> Generation:
    return asyncio.run(make_client(lambda body: result).generate([1, 2] if ids is None else ids, sampling))


def test_ids_log_probs_and_versions_come_back() -> None:
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}]
    response = generate(answer([7, 8, 9], log_probs=[-1, -2, -3], spans=spans, reason="length"))
    assert response.response_ids.tolist() == [7, 8, 9] and response.response_ids.dtype == np.int32
    assert response.log_mu.tolist() == [-1, -2, -3] and response.log_mu.dtype == np.float32
    assert response.weight_versions.tolist() == [3, 4, 4] and response.weight_versions.dtype == np.int32
    assert response.finish_reason == "length"


def test_every_sampling_parameter_is_said() -> None:
    requests: list[dict[str, Any]] = []
    client = make_client(lambda body: answer([1]), requests)
    asyncio.run(client.generate([1], SamplingParams(5, temperature=0.5, stop_token_ids=(9,), ignore_eos=True)))
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
    requests: list[dict[str, Any]] = []
    client = make_client(lambda body: answer([1]), requests)
    with pytest.raises(UserError, match=message):
        asyncio.run(client.generate(ids, SamplingParams(limit)))
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
        (httpx.Response(400, json={"error": {"message": "too long"}}), r"/generate failed with status 400: too long"),
        (httpx.Response(500, text="Internal"), r"failed with status 500: Internal"),
    ],
)
def test_bad_answers_are_named(result: Any, message: str) -> None:
    with pytest.raises(ServerError, match=message):
        generate(result)


def test_an_empty_response_is_fine() -> None:
    assert len(generate(answer([], spans=[], reason="abort")).response_ids) == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [(httpx.ConnectError("refused"), "gone or unreachable"), (httpx.ReadTimeout("late"), "no answer in time")],
)
def test_a_dead_connection_is_a_dead_server(error: Exception, message: str) -> None:
    def fail(body: Any) -> None:
        raise error

    with pytest.raises(ServerGoneError, match=r"http://server:1/generate: .*" + message):
        asyncio.run(make_client(fail).generate([1], SAMPLING))


def test_scores_drop_the_unscored_position() -> None:
    requests: list[dict[str, Any]] = []
    result = {"meta_info": {"input_token_logprobs": [[None, 2, None], [-0.1, 3, None], [-0.2, 4, None]]}}
    scores = asyncio.run(make_client(lambda body: result, requests).score([1, 2, 3, 4], start=2))
    np.testing.assert_allclose(scores, [-0.1, -0.2])
    assert requests[0]["logprob_start_len"] == 1
    with pytest.raises(UserError, match="start 0"):
        asyncio.run(make_client(lambda body: result).score([1, 2], start=0))


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


def test_control_raises_on_success_false() -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"success": False, "message": "no group"}))
    with SGLangControl("http://server:1", transport=transport) as control:
        with pytest.raises(ServerError, match="http://server:1/end_weight_update failed with status 200: no group"):
            control.end_weight_update()
        assert not control.ready()


def test_a_broken_connection_is_tried_again_but_a_server_that_is_gone_is_not() -> None:
    calls: list[int] = []

    def breaks_twice(body: dict[str, Any]) -> Any:
        calls.append(1)
        if len(calls) <= 2:
            raise httpx.ReadError("")
        return answer([7])

    assert asyncio.run(make_client(breaks_twice).generate([1], SAMPLING)).response_ids.tolist() == [7]
    assert len(calls) == 3

    def refuses(body: dict[str, Any]) -> Any:
        calls.append(1)
        raise httpx.ConnectError("refused")

    with pytest.raises(ServerGoneError, match="ConnectError: refused"):
        asyncio.run(make_client(refuses).generate([1], SAMPLING))
    assert len(calls) == 4
