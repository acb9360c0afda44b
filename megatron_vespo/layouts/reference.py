"""The update that every layout is compared with: one process, float64, and nothing of Megatron.

The model is the Hugging Face one of the same folder, under ``Float64``. Every sample runs alone, unpacked. Loss, phi,
clipping and Adam are written out here once more from their formulas. Run as
``python -m megatron_vespo.layouts.reference --config FILE --batch FILE --out FOLDER [section.key=value ...]``.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_vespo.algorithms.aggregation import Aggregation, Denominators
from megatron_vespo.algorithms.methods import make_advantages, make_aggregation, make_weighting
from megatron_vespo.algorithms.weights import whole_ratios
from megatron_vespo.config import AlgorithmSection, Config
from megatron_vespo.errors import UserError
from megatron_vespo.files import atomic_folder
from megatron_vespo.layouts.float64 import Float64
from megatron_vespo.layouts.outcome import WEIGHTS, Outcome
from megatron_vespo.layouts.settings import Update
from megatron_vespo.layouts.work import Work, read_work
from megatron_vespo.metrics.measure import minibatch_metrics
from megatron_vespo.types import Sample

CLIP_EPS = 1e-6
"""Added to the norm that gradients are divided by (megatron/core/optimizer/clip_grads.py, clip_grad_by_total_norm)."""


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """The response tokens of one sample: log pi (differentiable) and entropy (nats), each [R] float64."""

    log_pi: Tensor
    entropy: Tensor


def load_model(folder: str) -> Any:
    """The Hugging Face model of a folder in float64; call it under ``Float64``."""
    from transformers import AutoModelForCausalLM

    # Plain torch implementations: fused ones have kernels for narrower types only.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **plain).eval()
    # torch gives the row of config.json's pad_token_id no gradient. Nothing is padded here: where it is, it is meant.
    model.get_input_embeddings().padding_idx = None
    return model


def score(model: Any, sample: Sample, temperature: float) -> TokenFigures:
    """Log-probabilities of the response under softmax(logits / temperature), the sample alone."""
    ids = torch.tensor([*sample.prompt.input_ids.tolist(), *sample.sequence_ids.tolist()])
    sampled = torch.from_numpy(len(sample.prompt.input_ids) + sample.offsets)
    logits = model(ids[None, :-1], use_cache=False).logits[0, sampled - 1] / temperature
    log_probs = logits.log_softmax(-1)
    entropy = -(log_probs.detach().exp() * log_probs.detach()).sum(-1)
    return TokenFigures(log_probs.gather(-1, ids[sampled, None]).squeeze(-1), entropy)


@dataclass(frozen=True, slots=True)
class Loss:
    """The policy-gradient loss of one sample, -sum over tokens of stopgrad(kappa) * A * log pi / divisor.

    Attributes:
        algorithm: Kernel and aggregation.
        whole: Sizes of the whole batch.
    """

    algorithm: AlgorithmSection
    whole: Denominators

    def divisor(self, length: int) -> int:
        """What the tokens of a response of this length are divided by."""
        match make_aggregation(self.algorithm):
            case Aggregation.TOKEN_MEAN:
                return self.whole.tokens
            case Aggregation.SEQ_MEAN_TOKEN_MEAN:
                return self.whole.samples * length
            case Aggregation.SEQ_MEAN_TOKEN_SUM_NORM:
                return self.whole.samples * self.whole.max_response
        return self.whole.samples

    def weights(self, log_pi: Tensor, log_mu: Tensor, advantage: float) -> Tensor:
        """Kappa of each token of the sample, [R]."""
        index = torch.zeros(len(log_mu), dtype=torch.int64)
        advantages = torch.tensor([advantage], dtype=torch.float64)
        weighting = make_weighting(self.algorithm, knows_old=False)
        return weighting(whole_ratios(log_pi, log_mu, None, index, advantages))

    def __call__(self, sample: Sample, tokens: TokenFigures) -> tuple[Tensor, dict[str, float]]:
        """The sample's share of the loss, and its row of the table; a sample with an infinite log W adds nothing."""
        log_mu = torch.from_numpy(sample.log_mu).double()
        log_pi = tokens.log_pi.detach()
        log_ratio = log_pi - log_mu
        log_w = log_ratio.sum()
        kappa = self.weights(log_pi, log_mu, sample.advantage)
        if not bool(log_w.isfinite()):
            kappa = torch.zeros_like(kappa)
        heard = kappa * sample.advantage != 0
        loss = -(kappa * sample.advantage * tokens.log_pi)[heard].sum() / self.divisor(len(log_mu))
        return loss, {
            "loss": loss.item(),
            "log_w": log_w.item(),
            "log_drift": log_w.item(),
            "phi": kappa.mean().item(),
            "abs_log_ratio": log_ratio.abs().sum().item(),
            "max_abs_log_ratio": log_ratio.abs().max().item(),
            "entropy": tokens.entropy.sum().item(),
            "kl_ref": 0.0,
            "tokens": float(len(log_mu)),
        }


FIGURES = ("loss", "log_w", "log_drift", "phi", "abs_log_ratio", "max_abs_log_ratio", "entropy", "kl_ref", "tokens")
EMPTY = dict.fromkeys(FIGURES, 0.0)
"""The row of a sample without response tokens."""


def accumulate(model: Any, samples: Sequence[Sample], config: Config) -> dict[str, list[float]]:
    """Leave the gradient of the whole batch in the model's parameters; the table of all samples."""
    tokens = sum(len(sample.response_ids) for sample in samples)
    loss = Loss(config.algorithm, Denominators(tokens, len(samples), config.rollout.max_new_tokens))
    rows = []
    for sample in samples:
        if not len(sample.response_ids):
            rows.append(EMPTY)
            continue
        value, row = loss(sample, score(model, sample, config.rollout.temperature))
        value.backward()
        rows.append(row)
    return {name: [row[name] for row in rows] for name in EMPTY}


@torch.no_grad()
def grad_norm(parameters: Sequence[Tensor]) -> float:
    """Norm of the whole gradient; what has no gradient (experts that no token chose) counts as 0."""
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


@torch.no_grad()
def step(parameters: Sequence[Tensor], norm: float, update: Update) -> float:
    """Clip and take the first step of Adam.

    Both moments start from 0, and their bias corrections turn them into g and g^2 whatever the betas are. Like Megatron
    (optimizer/__init__.py, get_standard_config_overrides), vectors are not decayed.

    Returns:
        The largest change of a weight.
    """
    scale = 1.0
    if update.clip_grad > 0:
        scale = min(update.clip_grad / (norm + CLIP_EPS), 1.0)
    largest = 0.0
    for parameter in parameters:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad * scale
        decay = update.weight_decay if parameter.dim() > 1 else 0.0
        change = torch.zeros_like(parameter)
        if update.decoupled_weight_decay:
            change -= update.lr * decay * parameter
        else:
            gradient = gradient + decay * parameter
        change -= update.lr * gradient / (gradient.abs() + update.adam_eps)
        parameter += change
        largest = max(largest, float(change.abs().max()))
    return largest


class RouterGap:
    """The smallest gap between the last expert chosen and the first one not chosen, over all tokens and layers.

    Where it is near the rounding of float32 a layout may choose another expert, and no figure of that sample agrees.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.smallest = math.inf
        for module in model.modules():
            if type(module).__name__.endswith("Router") and hasattr(module, "top_k"):
                module.register_forward_hook(self._look)

    def _look(self, module: Any, inputs: Any, output: Any) -> None:
        probabilities = output[0].detach().softmax(-1)  # Hugging Face routers return their logits first
        if module.top_k < probabilities.shape[-1]:
            top = probabilities.topk(module.top_k + 1, dim=-1).values
            self.smallest = min(self.smallest, float((top[..., -2] - top[..., -1]).min()))


def compute(work: Work) -> tuple[Any, Outcome]:
    """The updated model and what the update did."""
    config = work.config
    make_advantages(config.algorithm)(work.batch.groups)
    with Float64():
        model = load_model(config.model.hf_path)
        gap = RouterGap(model)
        table = accumulate(model, work.samples, config)
        parameters = list(model.parameters())
        norm = grad_norm(parameters)
        largest = step(parameters, norm, Update.of(config))
    outcome = Outcome(
        table=table,
        metrics=minibatch_metrics(
            work.samples, {name: np.array(column) for name, column in table.items()}, work.batch.policy_version
        ),
        grad_norm=norm,
        facts={"largest_change": largest, "router_gap": gap.smallest},
    )
    return model, outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Compute the reference and write it.

    Returns:
        Exit status: 0, or 1 after an error that the user can mend.
    """
    try:
        work = read_work("megatron_vespo.layouts.reference", arguments)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        model, outcome = compute(work)
        if any(name.split(".")[0] == "megatron" for name in sys.modules):
            raise RuntimeError("the reference must not depend on Megatron, but it was imported")
        with atomic_folder(work.out) as folder:
            # Under the checkpoint's own names: transformers undoes what it fused in memory.
            model.save_pretrained(folder / WEIGHTS)
            outcome.write(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
