"""Adam that counts its steps as Transformer Engine's and apex's do, for machines with neither."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adam import adam


class Adam(torch.optim.Optimizer):
    """torch's Adam and AdamW, bit by bit, with ``step`` in the parameter groups instead of each parameter's state.

    Megatron's distributed optimizer saves and restores that kind alone (optimizer/distrib_optimizer.py:839, 1223).
    Groups without parameters count too, so that every pipeline stage has the same step for all of them.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        """Named as apex's FusedAdam names them.

        Args:
            params: Parameter groups.
            lr: Learning rate.
            weight_decay: Weight decay.
            betas: Decay of the first and of the second moment.
            eps: Added to the root of the second moment.
            adam_w_mode: Decoupled weight decay (AdamW) instead of an L2 penalty.
            capturable: Not supported: must be false.
        """
        if capturable:
            raise ValueError("optimizer_cuda_graph needs Transformer Engine or apex")
        self._adam_w_mode = adam_w_mode
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param]["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            adam(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                [torch.tensor(float(group["step"])) for _ in params],  # counted up by the function
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                decoupled_weight_decay=self._adam_w_mode,
            )
            group["step"] += 1
