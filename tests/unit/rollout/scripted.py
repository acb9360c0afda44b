"""A server made of a Python function."""

import json
from collections.abc import Callable
from typing import Any

import httpx

from megatron_vespo.rollout.client import SGLangClient

Answer = Callable[[dict[str, Any]], Any]


def answer(
    ids: list[int],
    *,
    version: str = "3",
    reason: str = "stop",
    log_probs: list[float | None] | None = None,
    spans: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What SGLang answers to a /generate."""
    log_probs = [-0.5] * len(ids) if log_probs is None else log_probs
    return {
        "output_ids": ids,
        "meta_info": {
            "finish_reason": {"type": reason},
            "output_token_logprobs": [[value, token, None] for value, token in zip(log_probs, ids, strict=True)],
            "weight_versions": [{"version": version, "start": 0, "end": len(ids)}] if spans is None else spans,
        },
    }


def make_transport(generate: Answer, requests: list[dict[str, Any]] | None = None) -> httpx.MockTransport:
    """``generate`` gets the body of each /generate and returns an answer or a response, or raises."""
    known = {
        "/model_info": {"weight_version": "3", "model_path": "m"},
        "/v1/models": {"data": [{"max_model_len": 64}]},
        "/server_info": {"max_req_input_len": 58, "max_total_num_tokens": 1000, "version": "0.5.23", "tp_size": 1},
    }

    def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path in known:
            return httpx.Response(200, json=known[request.url.path])
        body = json.loads(request.content)
        if requests is not None:
            requests.append(body)
        result = generate(body)
        return result if isinstance(result, httpx.Response) else httpx.Response(200, json=result)

    return httpx.MockTransport(handle)


def make_client(generate: Answer, requests: list[dict[str, Any]] | None = None) -> SGLangClient:
    return SGLangClient("http://server:1", vocab_size=32, transport=make_transport(generate, requests))
