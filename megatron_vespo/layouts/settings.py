"""What of a configuration the reference must know, and what it cannot honour. No torch here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from megatron_vespo.config import Config
from megatron_vespo.errors import UserError

UPDATE_OVERRIDES = ("megatron.lr=1.0e-3", "megatron.adam_eps=1.0e-3")
"""Adam's first step is lr * g / (|g| + eps). With the lr and eps of real training a step is no larger than the rounding
of the weights, and where |g| is near eps its sign is decided by rounding. With these it is large, and smooth in g."""


@dataclass(frozen=True, slots=True)
class Update:
    """Settings of Megatron's Adam, with the defaults of Megatron-Core 0.19.2 (optimizer/optimizer_config.py)."""

    lr: float
    adam_eps: float = 1e-8
    weight_decay: float = 0.01
    decoupled_weight_decay: bool = True
    clip_grad: float = 1.0

    @classmethod
    def of(cls, config: Config) -> Update:
        """As the ``megatron:`` section says.

        Raises:
            UserError: There is no learning rate.
        """
        if config.megatron.get("lr") is None:
            raise UserError("megatron.lr: missing; set the learning rate")
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.megatron.items() if name in names})


def _positive(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, int | float) and item > 0 for item in values)


# megatron.<key> -> (whether a value is refused, what would be right)
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("bf16", "fp16", "fp8", "fp4"), (bool, "layouts are compared in float32; remove it")),
    "params_dtype": (lambda value: value not in (None, "float32"), "layouts are compared in float32; remove it"),
    "optimizer": (lambda value: value != "adam", "the reference knows adam only"),
    **dict.fromkeys(
        ("moe_aux_loss_coeff", "moe_z_loss_coeff", "hidden_dropout", "attention_dropout"),
        (_positive, "the reference has no such term; set it to 0"),
    ),
    **dict.fromkeys(
        ("decoupled_lr", "apply_wd_to_qk_layernorm", "use_precision_aware_optimizer", "calculate_per_token_loss"),
        (bool, "the reference does not know it; remove it"),
    ),
    "grad_norm_skip_threshold": (lambda value: not math.isinf(value), "the reference takes every step; remove it"),
}


def check_comparable(config: Config) -> None:
    """Refuse what the reference cannot honour, so that no difference is blamed on a layout that is none of its.

    Raises:
        UserError: Names the key and what would be right.
    """
    for name, (refused, advice) in _REFUSED.items():
        if name in config.megatron and refused(config.megatron[name]):
            raise UserError(f"megatron.{name}={config.megatron[name]}: {advice}, on the command line for example")
    if config.objective != "rl":
        raise UserError(f"objective={config.objective}: layouts are compared on the update of objective=rl")
    if config.training.lr_warmup_steps:
        raise UserError("training.lr_warmup_steps: the first step of a warm-up moves nothing; set it to 0")
    if config.model.initialize != "hf":
        raise UserError("model.initialize=random: every layout draws other weights; name a checkpoint and set hf")
    if config.rollout.behavior_logprobs == "recompute":
        raise UserError(
            "rollout.behavior_logprobs=recompute: log W would be 0 in all samples; set it to rollout, which is what the"
            " batch holds"
        )
    Update.of(config)
