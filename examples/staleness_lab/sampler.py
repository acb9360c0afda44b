"""A sampler in this process: Qwen3-MoE with a KV cache in plain torch, all sequences of a batch at once.

It stands where SGLang stands in a real run, and like SGLang it may differ from the trainer: in precision, in quantised
linears, in noise on the router. Whatever it does, log mu is of the distribution that it really sampled from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.staleness_lab.fake_fp8 import Fp8
from megatron_vespo.errors import UserError
from megatron_vespo.types import FINISH_LENGTH, FINISH_STOP, ExpertArray, FloatArray, IntArray

# Sequences sampled at a time: their keys and values fit a CPU's cache.
_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Perturbation:
    """How the sampler differs from an exact one.

    Attributes:
        dtype: Of weights and activations; routing probabilities, norms and log-probabilities are float32 all the same.
        fp8: How expert linears are quantised; None: not.
        fp8_attention: Quantise the linears of attention too.
        router_noise: Standard deviation of Gaussian noise on the router's logits.
    """

    dtype: torch.dtype = torch.float32
    fp8: Fp8 | None = None
    fp8_attention: bool = False
    router_noise: float = 0.0


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled response: token ids, their log-probabilities (nats), why it ended, experts as of ``Sample``."""

    ids: IntArray
    log_mu: FloatArray
    finish_reason: str
    routed_experts: ExpertArray


class Sampler:
    """Holds weights and samples with them.

    Args:
        architecture: The ``config.json`` of a Qwen3-MoE all of whose layers have experts.
        perturbation: How it differs from an exact one.
        seed: Of the random numbers it draws.
    """

    def __init__(self, architecture: dict[str, Any], perturbation: Perturbation, seed: int) -> None:
        self._config, self._perturbation = architecture, perturbation
        self._random = torch.Generator().manual_seed(seed)
        self._weights: dict[str, Tensor] = {}
        self._chosen: list[Tensor] = []  # in the last forward pass, of each layer, [B, T, experts a token]
        dim, longest = architecture["head_dim"], architecture["max_position_embeddings"]
        frequencies = architecture["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(longest, dtype=torch.float64), frequencies).repeat(1, 2)
        self._cos, self._sin = angles.cos().float(), angles.sin().float()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take a copy of the weights, by their Hugging Face names."""
        raw = {name.removeprefix("model."): tensor.detach().clone() for name, tensor in weights}
        for layer in range(self._config["num_hidden_layers"]):
            experts = f"layers.{layer}.mlp.experts"
            parts = {
                kind: torch.stack([raw.pop(f"{experts}.{i}.{kind}_proj.weight") for i in range(self._num_experts)])
                for kind in ("gate", "up", "down")
            }
            raw[f"{experts}.gate_up"] = torch.cat([self._expert(parts["gate"]), self._expert(parts["up"])], 1)
            raw[f"{experts}.down"] = self._expert(parts["down"])
            if self._perturbation.fp8 is not None and self._perturbation.fp8_attention:
                for kind in "qkvo":
                    name = f"layers.{layer}.self_attn.{kind}_proj.weight"
                    raw[name] = self._perturbation.fp8.weight(raw[name])
        # Experts as [experts, in, out], to be multiplied from the right.
        self._weights = {
            name: (tensor.mT.contiguous() if ".experts." in name else tensor).to(self._perturbation.dtype)
            for name, tensor in raw.items()
        }

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[IntArray],
        samples: int,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        temperature: float,
    ) -> list[list[Response]]:
        """Sample responses.

        Args:
            prompts: Token ids, all prompts of one length.
            samples: Responses to each.
            max_new_tokens: Longest response.
            stop_ids: Tokens that end a response, as a part of it.
            temperature: Of the softmax.

        Raises:
            UserError: The prompts have different lengths, or the weights have diverged.
        """
        if len({len(prompt) for prompt in prompts}) != 1:
            raise UserError("the laboratory's sampler takes prompts of one length")
        chunk, found = max(1, _CHUNK // samples), []
        for start in range(0, len(prompts), chunk):
            ids = torch.from_numpy(np.stack(prompts[start : start + chunk])).long()
            found += self._generate(ids, samples, max_new_tokens, torch.tensor(list(stop_ids)), temperature)
        return [found[i : i + samples] for i in range(0, len(found), samples)]

    @torch.no_grad()
    def log_probs(self, ids: Tensor) -> Tensor:
        """log softmax over the vocabulary after each token: ids [B, T] -> [B, T, V] float32."""
        cache = self._new_cache(len(ids), ids.shape[1])
        return F.log_softmax(self._head(self._hidden(ids, 0, cache)), -1)

    def _generate(
        self, prompts: Tensor, samples: int, limit: int, stop_ids: Tensor, temperature: float
    ) -> list[Response]:
        length = prompts.shape[1]
        cache = self._new_cache(len(prompts), length + limit)
        logits = self._head(self._hidden(prompts, 0, cache)[:, -1]).repeat_interleave(samples, 0)
        chosen = self._last_chosen().repeat_interleave(samples, 0)
        cache = [tensor.repeat_interleave(samples, 0) for tensor in cache]
        count = len(logits)
        tokens, log_mu = torch.zeros(count, limit, dtype=torch.int64), torch.zeros(count, limit)
        routed = torch.zeros(count, limit, *chosen.shape[1:], dtype=torch.int16)
        lengths, stopped = torch.full((count,), limit), torch.zeros(count, dtype=torch.bool)
        active = torch.arange(count)  # rows of the cache -> sequences
        for step in range(limit):
            log_probs = F.log_softmax(logits / temperature, -1)
            if not bool(log_probs.isfinite().all()):
                raise UserError("the sampler's log-probabilities are NaN or infinite: the weights have diverged")
            token = torch.multinomial(log_probs.exp(), 1, generator=self._random)
            tokens[active, step] = token[:, 0]
            log_mu[active, step] = log_probs.gather(1, token)[:, 0]
            routed[active, step] = chosen
            ended = torch.isin(token[:, 0], stop_ids) & ~stopped[active]
            stopped[active[ended]], lengths[active[ended]] = True, step + 1
            going = (~stopped[active]).nonzero()[:, 0]
            if len(going) == 0 or step + 1 == limit:
                break
            if len(going) <= len(active) // 2:  # leave finished ones behind
                active, token, cache = active[going], token[going], [tensor[going] for tensor in cache]
            logits = self._head(self._hidden(token, length + step, cache)[:, 0])
            chosen = self._last_chosen()
        return [
            Response(
                tokens[i, :n].numpy().astype(np.int32),
                log_mu[i, :n].numpy(),
                FINISH_STOP if ends else FINISH_LENGTH,
                routed[i, :n].numpy(),
            )
            for i, (n, ends) in enumerate(zip(lengths.tolist(), stopped.tolist(), strict=True))
        ]

    @property
    def _num_experts(self) -> int:
        return int(self._config["num_experts"])

    def _expert(self, weight: Tensor) -> Tensor:
        return weight if self._perturbation.fp8 is None else self._perturbation.fp8.weight(weight)

    def _new_cache(self, batch: int, length: int) -> list[Tensor]:
        """Keys and values of each layer in turn, [B, groups, length, head_dim]."""
        shape = batch, self._config["num_key_value_heads"], length, self._config["head_dim"]
        return [
            torch.empty(shape, dtype=self._perturbation.dtype) for _ in range(2 * self._config["num_hidden_layers"])
        ]

    def _hidden(self, ids: Tensor, past: int, cache: list[Tensor]) -> Tensor:
        """Final hidden states [B, T, H] of tokens [B, T] at positions past, past + 1, ...; extends the cache."""
        self._chosen = []
        x = F.embedding(ids, self._weights["embed_tokens.weight"])
        for layer in range(self._config["num_hidden_layers"]):
            name = f"layers.{layer}"
            normed = self._norm(x, f"{name}.input_layernorm")
            x = x + self._attention(normed, f"{name}.self_attn", past, cache[2 * layer], cache[2 * layer + 1])
            x = x + self._experts(self._norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
        return self._norm(x, "norm")

    def _last_chosen(self) -> Tensor:
        """Experts of the last position of the last forward pass, [B, layers, experts a token] int16."""
        return torch.stack([chosen[:, -1] for chosen in self._chosen], 1).to(torch.int16)

    def _head(self, hidden: Tensor) -> Tensor:
        name = "embed_tokens.weight" if self._config["tie_word_embeddings"] else "lm_head.weight"
        return (hidden @ self._weights[name].t()).float()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self._weights[f"{name}.weight"]
        return F.rms_norm(x.float(), weight.shape, weight.float(), self._config["rms_norm_eps"]).to(x.dtype)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        fp8 = self._perturbation.fp8 if self._perturbation.fp8_attention else None
        return F.linear(x if fp8 is None else fp8.activation(x), self._weights[f"{name}.weight"])

    def _attention(self, x: Tensor, name: str, past: int, keys: Tensor, values: Tensor) -> Tensor:
        batch, length, _ = x.shape
        dim, groups = self._config["head_dim"], self._config["num_key_value_heads"]
        q, k, v = (
            self._linear(x, f"{name}.{kind}_proj").view(batch, length, -1, dim).transpose(1, 2) for kind in "qkv"
        )
        end = past + length
        q = self._rotate(self._norm(q, f"{name}.q_norm"), past, end)
        keys[:, :, past:end] = self._rotate(self._norm(k, f"{name}.k_norm"), past, end)
        values[:, :, past:end] = v
        # Query heads of a group beside each other: [B, groups, heads / groups * T, head_dim].
        q = q.reshape(batch, groups, -1, dim)
        scores = (q @ keys[:, :, :end].mT).float() * dim**-0.5
        if length > 1:
            future = torch.ones(length, end, dtype=torch.bool).triu(past + 1)
            scores = scores.view(batch, groups, -1, length, end).masked_fill(future, -torch.inf).flatten(2, 3)
        out = scores.softmax(-1).to(x.dtype) @ values[:, :, :end]
        out = out.view(batch, -1, length, dim).transpose(1, 2).reshape(batch, length, -1)
        return self._linear(out, f"{name}.o_proj")

    def _rotate(self, x: Tensor, start: int, end: int) -> Tensor:
        """Rotary embedding of [B, heads, T, head_dim]."""
        first, second = x.float().chunk(2, -1)
        rotated = x.float() * self._cos[start:end] + torch.cat([-second, first], -1) * self._sin[start:end]
        return rotated.to(x.dtype)

    def _experts(self, x: Tensor, name: str) -> Tensor:
        """Every expert computes every token; what a token's router did not choose gets weight 0."""
        tokens, fp8 = x.flatten(0, 1), self._perturbation.fp8
        logits = F.linear(tokens, self._weights[f"{name}.gate.weight"]).float()
        if self._perturbation.router_noise:
            noise = torch.randn(logits.shape, generator=self._random)
            logits = logits + self._perturbation.router_noise * noise
        probs, chosen = logits.softmax(-1).topk(self._config["num_experts_per_tok"], -1)
        self._chosen.append(chosen.view(*x.shape[:2], -1))
        if self._config["norm_topk_prob"]:
            probs = probs / probs.sum(-1, keepdim=True)
        shares = torch.zeros_like(logits).scatter_(1, chosen, probs)
        inputs = tokens if fp8 is None else fp8.activation(tokens)
        gate, up = torch.matmul(inputs, self._weights[f"{name}.experts.gate_up"]).chunk(2, -1)  # [experts, tokens, I]
        inner = F.silu(gate) * up
        if fp8 is not None:  # each expert's own tokens, as a grouped kernel sees them
            mine = (shares.t() > 0).unsqueeze(-1).to(x.dtype)
            inner = torch.stack([fp8.activation(expert) for expert in inner * mine])
        outputs = torch.bmm(inner, self._weights[f"{name}.experts.down"])
        return (outputs * shares.t().unsqueeze(-1).to(x.dtype)).sum(0).view_as(x)
