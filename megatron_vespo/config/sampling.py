"""Sections about sampling: where SGLang runs, how it samples, how weights reach it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_vespo.config.section import Section


class ServerSection(Section):
    """Where SGLang runs. Without ``url`` the trainer starts a server of its own and stops it at the end."""

    url: str | list[str] | None = None
    """Address of a running server, http://host:port, or a list of them: groups are spread over them, and all get every
    push. They must serve the same architecture. One that does not answer is left out until it does."""
    url_file: str | None = None
    """Instead: a file with one address a line, or a folder of such files, read anew at every push. Servers join and
    leave by it; `python -m megatron_vespo.serve` writes it."""
    router: str | None = None
    """Instead: address of an sglang-router. Requests go through it, weights to the workers that it names."""
    balance: Literal["least_loaded", "round_robin"] = "least_loaded"
    """Which of several servers gets the next group."""
    hang_timeout: float = Field(default=60.0, gt=0)
    """Seconds without any answer, while requests are in flight, after which a server's health is asked; one that does
    not answer that either, for as long (5 to 30 seconds), counts as dead."""
    max_restarts: int = Field(default=3, ge=0)
    """Times that one of the run's own servers is started again after it died or hung, without a finished step between.
    """
    python: str | None = None
    """Interpreter of SGLang's own environment; default: the trainer's."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of the server that is started."""
    host: str = "127.0.0.1"
    """Address that the server binds to. One that other machines reach gets an API key, a new one for each run."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the servers' API key: of running ones, or instead of a new one."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the server, the next ones of the node 10 apart; default: free ones."""
    startup_timeout: float = Field(default=600.0, gt=0)
    """Seconds until a server that is not ready is given up."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.url, list) and len({url.rstrip("/") for url in self.url}) != len(self.url):
            raise ValueError(f"url: {self.url} names a server twice")
        if self.url == []:
            raise ValueError("url: an empty list; leave it out for a server of the run's own")
        named = [name for name in ("url", "url_file", "router") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)}: say in one way where the servers are")
        return self

    @property
    def is_own(self) -> bool:
        """Whether the run starts servers of its own."""
        return self.named_by is None

    @property
    def named_by(self) -> str | None:
        """The field that says where running servers are."""
        return next((name for name in ("url", "url_file", "router") if getattr(self, name) is not None), None)

    @property
    def urls(self) -> list[str]:
        """Addresses of running servers; none where the run starts its own."""
        return [self.url] if isinstance(self.url, str) else self.url or []


class PlacementSection(Section):
    """Which GPUs train and which serve, where the run starts its own servers."""

    mode: Literal["disaggregated", "colocate"] = "disaggregated"
    """`disaggregated`: the servers have devices of their own, those of the node after the trainer's, and weights reach
    them over a process group. `colocate`: trainer and servers share the same devices in turns; each gives its memory up
    for the other's turn, and weights are handed over in the device's memory (weight_sync.transport: tensor).
    Synchronous training only."""
    servers_per_node: int = Field(default=1, ge=1)
    """Servers that are started on each node with trainer ranks. One takes sglang.tp_size * pp_size devices, times
    dp_size without data-parallel attention."""


class RolloutSection(Section):
    """Sampling from the policy with SGLang."""

    prompts_per_step: int = Field(default=32, ge=1)
    """Prompts (groups) of one rollout batch."""
    samples_per_prompt: int = Field(default=8, ge=1)
    """Responses to each prompt: the group that advantages are relative to."""
    max_new_tokens: int = Field(default=1024, ge=1)
    """Longest response, in tokens."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens; default: what the model's context leaves beside max_new_tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; the trainer's log-probabilities are of the same tempered distribution."""
    stop_token_ids: list[int] = []
    """Token ids that end a response, besides the model's own end-of-sequence token."""
    generate: str | None = None
    """How a response is made, path/to/file.py:function or package.module:function, where it is more than one turn: an
    `async def` of (conversation, prompt) that lets the policy generate and inserts what tools say, which is not trained
    on (docs/multi_turn.md). max_new_tokens is then the room for all that follows the prompt."""
    max_staleness: int = Field(default=0, ge=0)
    """S: rollout batches that generation may run ahead of training. 0: synchronous. No token is older than (S + 1) * N
    - 1 optimizer steps when it is trained on, N being training.minibatches_per_step; that is asserted."""
    over_sampling: float = Field(default=0.0, ge=0, le=1)
    """Share of further prompts beside prompts_per_step that are sampled, so that a batch need not wait for its longest
    responses: it takes the groups finished first, a group passed over is waited for in a later batch. Short responses
    come first, so that batches are biased towards them."""
    filter_equal_groups: int = Field(default=0, ge=0)
    """Most groups of a batch that are dropped because their rewards are all equal, so that further prompts take their
    places (DAPO's dynamic sampling); beyond that number such groups are kept. 0: off."""
    behavior_logprobs: Literal["rollout", "recompute", "both"] = "rollout"
    """mu: `rollout` is what SGLang reported when it sampled the token; `recompute` is the trainer's own forward pass
    over the fresh batch, pi_old, which hides the mismatch between the engines; `both` keeps mu and pi_old apart: the W
    of vespo stays pi / mu, clipping looks at pi / pi_old, corrections at pi_old / mu, and metrics have each part."""
    save_batches: bool = False
    """Keep every rollout batch whole, as rollouts/batch_000001.msgpack in the run folder, written before training on
    it; always on with objective rollout."""
    replay: str | None = None
    """Objective rl: a folder of saved rollout batches to train on in the order of their numbers, training.steps of
    them, without a server; data and evaluation are not used. Other settings than theirs of temperature,
    prompts_per_step or samples_per_prompt are refused."""
    concurrency: int = Field(default=512, ge=1)
    """Requests in flight at once."""
    request_timeout: float = Field(default=600.0, gt=0)
    """Seconds until a generation request that has not been answered fails the run."""
    server: ServerSection = ServerSection()


class WeightSyncSection(Section):
    """How new weights reach SGLang after each rollout batch."""

    transport: Literal["broadcast", "delta", "disk", "tensor"] | None = None
    """`broadcast` over a process group with the servers (gloo on CPU, NCCL on GPU); `delta` over the same group, only
    what changed bit for bit since the last push, for a copy of the weights in rank 0's host memory; `disk` writes an HF
    folder that the servers read; `tensor` hands over memory of the device that both sides share (placement.mode:
    colocate). Default: `tensor` with colocate, `broadcast` otherwise."""
    bucket_megabytes: int = Field(default=512, ge=1)
    """Weights put together at a time; rank 0 holds up to three times as much while it receives, checks and sends. With
    `tensor` every rank holds twice as much beside that during a push."""
    pause: Literal["retract", "in_place", "abort"] = "retract"
    """What happens to requests in flight during a push. `retract`: they wait, their keys and values are computed anew
    with the new weights, and every later token is exactly the new policy's. `abort`: the server gives back what they
    have and they are sent again as continuations, exact too. `in_place`: they go on with the keys and values of the old
    weights; cheapest, but their tokens are of neither policy alone, though log mu is still what they were sampled
    with."""
    verify: Literal["checksum", "none"] = "checksum"
    """`checksum` compares fingerprints of all tensors, taken from the trainer's and from the servers' memory, after
    every push; a mismatch is an error, or with `delta` a push of all weights. A server that changes weights on purpose
    (quantisation) needs `none`."""
