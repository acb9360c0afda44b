"""SGLang's HTTP interface as data: routes, request bodies, and the checks of what goes out and what comes back.

No network here. :mod:`client` sends these asynchronously (generation), :mod:`control` synchronously (weights).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_vespo.errors import UserError
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_STOP,
    UNKNOWN_EXPERT,
    ExpertArray,
    FloatArray,
    IntArray,
)

# SGLang keeps two tokens of the context for itself and silently generates fewer tokens rather than refuse.
RESERVED_CONTEXT_TOKENS = 2
# SGLang's own word for the weights it started with, until a push names others.
UNPUSHED = "default"
CONNECT_TIMEOUT_SECONDS = 60.0  # a loaded machine accepts late; where nothing listens, the refusal comes at once
# uvicorn drops idle connections after 5 s unless told otherwise (our own servers are); ours must be given up before, or
# a request may race with that.
KEEPALIVE_SECONDS = 2.0
MESSAGE_LENGTH = 800
# What a router answers for a worker that is gone, and a server that is about to go.
GATEWAY_FAILURES = (502, 503, 504)


class ServerError(UserError):
    """A request to an SGLang server failed: names its address, the route and what the server said."""


class ServerGoneError(ServerError):
    """The connection failed: the server died, was never there, or does not answer.

    Attributes:
        url: Its address; empty where it is one of several.
    """

    def __init__(self, message: str, url: str = "") -> None:
        super().__init__(message)
        self.url = url


class ServerTimeoutError(ServerGoneError):
    """No answer in time: the server hangs, or the time is too short."""


class UnpushedError(ServerError):
    """The server generates with weights that nobody pushed."""


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request: what to send where."""

    route: str
    body: dict[str, Any] | None = None
    method: str = "POST"


@dataclass(frozen=True, slots=True)
class Generation:
    """What the server sampled: token ids, log-probs (nats) and weight versions, all of shape [R]; R may be 0.

    ``routed_experts`` as of ``Sample``; None: not asked for.
    """

    response_ids: IntArray
    log_mu: FloatArray
    weight_versions: IntArray
    finish_reason: str
    routed_experts: ExpertArray | None = None

    def __add__(self, rest: Generation) -> Generation:
        """This part followed by its continuation."""
        return Generation(
            np.concatenate([self.response_ids, rest.response_ids]),
            np.concatenate([self.log_mu, rest.log_mu]),
            np.concatenate([self.weight_versions, rest.weight_versions]),
            rest.finish_reason,
            None
            if self.routed_experts is None or rest.routed_experts is None
            else np.concatenate([self.routed_experts, rest.routed_experts]),
        )


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself.

    Attributes:
        context_length: Tokens of prompt and response together that the model was set up for.
        max_prompt_tokens: Longest prompt it takes.
        max_total_tokens: Longest prompt and response together it really generates.
        weight_version: Of its weights now; :data:`UNPUSHED` before the first push.
        model_path: Where its weights came from.
        sglang_version: Version of SGLang.
        tensor_parallel_size: Processes that hold its weights.
        weight_loaders: Import paths of the weight loaders that it was started with.
        deterministic: Whether a request's seed determines its response.
        returns_routed_experts: Whether it says which experts it chose.
    """

    context_length: int
    max_prompt_tokens: int
    max_total_tokens: int
    weight_version: str
    model_path: str
    sglang_version: str
    tensor_parallel_size: int
    weight_loaders: tuple[str, ...]
    deterministic: bool
    returns_routed_experts: bool = False


READY = Request("/ready", method="GET")
HEALTH = Request("/health", method="GET")
MODEL_INFO = Request("/model_info", method="GET")
MODELS = Request("/v1/models", method="GET")
SERVER_INFO = Request("/server_info", method="GET")
FLUSH_CACHE = Request("/flush_cache")
ABORT_ALL = Request("/abort_request", {"abort_all": True})
CONTINUE_GENERATION = Request("/continue_generation", {})
BEGIN_WEIGHT_UPDATE = Request("/begin_weight_update", {})
END_WEIGHT_UPDATE = Request("/end_weight_update", {})
INFO_REQUESTS = (MODEL_INFO, MODELS, SERVER_INFO)


def generate_request(
    input_ids: Sequence[int],
    sampling: SamplingParams,
    max_new_tokens: int,
    seed: int | None = None,
    cache_key: str | None = None,
    routed_experts: bool = False,
) -> Request:
    """Sample one response, with log-probs. ``seed`` is for servers with deterministic inference; others ignore it."""
    params = sampling.body(max_new_tokens) | ({} if seed is None else {"sampling_seed": seed})
    body = {"input_ids": list(input_ids), "sampling_params": params, "return_logprob": True}
    if routed_experts:  # from the last token of the prompt on, whose forward pass gives the first one sampled
        body |= {"return_routed_experts": True, "routed_experts_start_len": len(input_ids) - 1}
    return Request("/generate", body | ({} if cache_key is None else {"extra_key": cache_key}))


def score_request(input_ids: Sequence[int], start: int) -> Request:
    """Log-probs of ``input_ids[start:]`` without sampling; SGLang gives none for the first position it reports."""
    body = {
        "input_ids": list(input_ids),
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": start - 1,
    }
    return Request("/generate", body)


def check_ids(input_ids: Sequence[int], vocab_size: int, url: str) -> None:
    """Refuse ids that would kill the server: none at all, or one outside the vocabulary."""
    if len(input_ids) == 0:
        raise UserError(f"request to {url}: no token ids; a prompt needs at least one token")
    lowest, highest = min(input_ids), max(input_ids)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise UserError(
            f"request to {url}: token id {wrong} is outside the vocabulary of {vocab_size}; "
            "do the tokenizer and the model belong together?"
        )


def check_length(prompt_tokens: int, max_new_tokens: int, info: ServerInfo, url: str) -> None:
    """Refuse what the server would refuse or, worse, silently cut short."""
    if prompt_tokens > info.max_prompt_tokens or prompt_tokens + max_new_tokens > info.max_total_tokens:
        raise UserError(
            f"request to {url}: {prompt_tokens} prompt tokens + max_new_tokens {max_new_tokens} do not fit: with its "
            f"context length of {info.context_length} the server takes {info.max_prompt_tokens} prompt tokens and "
            f"{info.max_total_tokens} in all; lower sampling.max_new_tokens or the prompt limit, or raise "
            "sglang.context_length"
        )


def parse_response(url: str, request: Request, status: int, content: bytes) -> Any:
    """The decoded answer of this status and body.

    Raises:
        ServerError: an error status, or ``success: false``; :class:`ServerGoneError` where the status says so.
    """
    where = f"{url}{request.route}"
    try:
        answer = json.loads(content) if content else {}
    except ValueError:
        answer = {"message": content.decode(errors="replace")}
    if 200 <= status < 300 and not (isinstance(answer, dict) and answer.get("success") is False):
        return answer
    kind = ServerGoneError if status in GATEWAY_FAILURES else ServerError
    raise kind(f"{where} failed with status {status}: {_message(answer)[:MESSAGE_LENGTH]}")


def connection_error(url: str, request: Request, error: Exception, *, timed_out: bool) -> ServerGoneError:
    """The error for a request that got no answer: what the HTTP library raised, and whether that was a timeout."""
    if timed_out:
        return ServerTimeoutError(f"{url}{request.route}: no answer in time ({type(error).__name__})", url)
    reason = f"{type(error).__name__}: {error}"
    return ServerGoneError(f"{url}{request.route}: the server is gone or unreachable ({reason})", url)


def parse_info(answers: Sequence[Any]) -> ServerInfo:
    """Answers to :data:`INFO_REQUESTS`, in order."""
    model, models, server = answers
    context_length = models["data"][0]["max_model_len"]
    return ServerInfo(
        context_length=context_length,
        max_prompt_tokens=server["max_req_input_len"] - 1,  # SGLang refuses a prompt of exactly that length
        max_total_tokens=min(context_length, server["max_total_num_tokens"]) - RESERVED_CONTEXT_TOKENS,
        weight_version=model["weight_version"],
        model_path=model["model_path"],
        sglang_version=server["version"],
        tensor_parallel_size=server["tp_size"],
        weight_loaders=tuple(server.get("custom_weight_loader") or ()),
        deterministic=bool(server.get("enable_deterministic_inference")),
        returns_routed_experts=bool(server.get("enable_return_routed_experts")),
    )


def parse_generation(
    url: str,
    answer: dict[str, Any],
    unpushed_version: int | None = None,
    routing: tuple[int, int] | None = None,
) -> Generation:
    """Check and convert the answer to a ``/generate``.

    Args:
        url: Address of the server.
        answer: What it said.
        unpushed_version: As of :func:`parse_version`.
        routing: Layers of the model and experts a token, where it was asked which were chosen.

    Raises:
        ServerError: not one finite log-prob a token, weight versions that do not cover all tokens or are no integers,
            experts of other tokens.
    """
    where, meta = f"{url}/generate", answer["meta_info"]
    ids = answer["output_ids"]
    pairs = meta["output_token_logprobs"][: len(ids)] if ids else []
    if [pair[1] for pair in pairs] != ids:
        raise ServerError(f"{where}: {len(ids)} tokens but log-probabilities of {len(pairs)}, or of other tokens")
    log_mu = [pair[0] for pair in pairs]
    if any(value is None or not math.isfinite(value) for value in log_mu):
        raise ServerError(f"{where}: a log-probability is not finite; do the server's weights hold NaN?")
    reason = (meta["finish_reason"] or {}).get("type")
    if reason not in (FINISH_STOP, FINISH_LENGTH, FINISH_ABORT):
        raise ServerError(f"{where}: unknown finish reason {meta['finish_reason']}")
    versions = _token_versions(where, meta.get("weight_versions"), len(ids), unpushed_version)
    return Generation(
        np.asarray(ids, np.int32),
        np.asarray(log_mu, np.float32),
        versions,
        reason,
        None if routing is None else _routed_experts(where, meta.get("routed_experts"), versions, routing),
    )


def parse_scores(url: str, answer: dict[str, Any], count: int) -> FloatArray:
    """The ``count`` log-probs in the answer to :func:`score_request`."""
    # The ids beside them are no check: SGLang reports the vocabulary's last id as 0, though it scores the right one.
    pairs = answer["meta_info"]["input_token_logprobs"][1:]
    if len(pairs) != count or any(pair[0] is None for pair in pairs):
        raise ServerError(f"{url}/generate: asked for the log-probabilities of {count} tokens, got {pairs}")
    return np.asarray([pair[0] for pair in pairs], np.float32)


def parse_version(where: str, version: Any, unpushed_version: int | None = None) -> int:
    """The policy version. We push ``str(int)``; anything else was never pushed by us.

    Args:
        where: For the error message.
        version: What the server says.
        unpushed_version: What weights that nobody pushed count as, where none are meant to be; None: an error.
    """
    text = str(version)
    if text == UNPUSHED and unpushed_version is not None:
        return unpushed_version
    if text.isascii() and text.isdigit():
        return int(text)
    raise UnpushedError(
        f"{where}: the server's weights have version {text!r}, not a policy version: push weights before generating"
    )


def _token_versions(
    where: str, spans: list[dict[str, Any]] | None, count: int, unpushed_version: int | None
) -> IntArray:
    """[count] versions from ``{version, start, end}`` spans, which must follow each other from 0 to ``count``."""
    versions = np.empty(count, np.int32)
    end = 0
    for span in spans or [] if count else []:
        if span["start"] != end or span["end"] < end:
            break
        versions[end : span["end"]] = parse_version(where, span["version"], unpushed_version)
        end = span["end"]
    if end != count:
        raise ServerError(f"{where}: weight version spans {spans} do not cover the {count} tokens")
    return versions


def _routed_experts(where: str, encoded: str | None, versions: IntArray, routing: tuple[int, int]) -> ExpertArray:
    """[R, layers, experts a token] from base64 of int32; an answer without them says nothing of any token."""
    shape = (len(versions), *routing)
    if not encoded:
        return np.full(shape, UNKNOWN_EXPERT, np.int16)
    chosen = np.frombuffer(base64.b64decode(encoded), np.int32)
    if chosen.size != math.prod(shape):
        raise ServerError(f"{where}: {chosen.size} chosen experts, not {' x '.join(map(str, shape))}")
    experts = chosen.reshape(shape).astype(np.int16)
    # A push may have had the tokens before it computed again, and SGLang keeps the experts of the last time.
    experts[versions != versions[-1]] = UNKNOWN_EXPERT
    return experts


def _message(answer: Any) -> str:
    """SGLang puts its message in one of several places."""
    if isinstance(answer, dict):
        for key in ("error", "message", "detail"):
            if key in answer:
                return _message(answer[key])
    return str(answer)


@dataclass(frozen=True, slots=True)
class TensorList:
    """Names, dtypes and shapes of the tensors of one broadcast, in the order they are sent; HF names."""

    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
