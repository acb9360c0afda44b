"""The loss of each method as its paper writes it: what the weight kernels' gradients are compared with.

Written without a look at the package, from the papers: padded tensors [G, L] in float64, min and clip where the paper
has min and clip, ``detach`` where it has a stop-gradient, the paper's own advantage and its own normalisation. Autograd
does the rest. One group of G answers to one prompt is the whole minibatch, so a sum over the group is the paper's sum.
KL terms are left out. An answer without tokens adds 0, and counts among the G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """G answers to one prompt, padded to L tokens with anything finite; everything is float64.

    Attributes:
        log_pi: log pi_theta of each token, the current policy, shape [G, L], requires grad.
        log_old: log pi_old, the trainer's policy when the step began, shape [G, L].
        log_mu: log mu, the policy that sampled, as its engine says, shape [G, L].
        mask: 1 for a response token, 0 for padding, shape [G, L].
        rewards: Shape [G].
        max_length: The most tokens an answer may have, the generation budget.
    """

    log_pi: Tensor
    log_old: Tensor
    log_mu: Tensor
    mask: Tensor
    rewards: Tensor
    max_length: int

    @property
    def size(self) -> int:
        """G."""
        return len(self.rewards)

    @property
    def lengths(self) -> Tensor:
        """|o_i|, shape [G]; 1 for an answer without tokens, whose sums are 0 anyway."""
        return self.mask.sum(1).clamp(min=1)

    def sum(self, tokens: Tensor) -> Tensor:
        """Sum over the tokens of each answer, [G, L] -> [G]."""
        return (tokens * self.mask).sum(1)


PaperLoss = Callable[[Group], Tensor]


def normalized(rewards: Tensor) -> Tensor:
    """(r_i - mean) / std, shape [G, 1] (GRPO, arXiv 2402.03300, section 4.1.2; DAPO Eq. 9; GSPO Eq. 6).

    No paper says which std; this is ``torch.std``, divisor G - 1, as in TRL, verl and Dr. GRPO's code. Equal rewards,
    0 / 0 in the papers, are 0.
    """
    if (rewards == rewards[0]).all():
        return torch.zeros_like(rewards)[:, None]
    return ((rewards - rewards.mean()) / rewards.std())[:, None]


def centered(rewards: Tensor) -> Tensor:
    """r_i - mean, shape [G, 1] (Dr. GRPO, arXiv 2503.20783)."""
    return (rewards - rewards.mean())[:, None]


def clipped_objective(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """min(r A, clip(r, 1 - low, 1 + high) A) (PPO, arXiv 1707.06347, Eq. 7)."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def grpo_tokens(group: Group, dual_clip: float = 3.0) -> Tensor:
    """The term of each token in GRPO's sum, with dual clip: max(min(r A, clip(r) A), c A) where A < 0, shape [G, L].

    Dual clip is Ye et al., arXiv 1912.09729, whose c is 3; GRPO's paper has none, verl turns it on by default.
    """
    advantages = normalized(group.rewards)
    objective = clipped_objective((group.log_pi - group.log_old).exp(), advantages, 0.2, 0.2)
    return torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)


def grpo(group: Group, dual_clip: float = 3.0) -> Tensor:
    """GRPO: DeepSeekMath, arXiv 2402.03300, Eq. 3: the mean over answers of the mean over each one's tokens.

    The paper does not say its eps; 0.2 is PPO's, TRL's and verl's.
    """
    return -(group.sum(grpo_tokens(group, dual_clip)) / group.lengths).sum() / group.size


def grpo_without_dual_clip(group: Group) -> Tensor:
    """GRPO as in its paper, ``dual_clip`` infinite."""
    return grpo(group, float("inf"))


def dapo(group: Group) -> Tensor:
    """DAPO: arXiv 2503.14476, Eqs. 8 and 9, clip-higher .2 and .28: the mean over all tokens of the group."""
    advantages = normalized(group.rewards)
    objective = clipped_objective((group.log_pi - group.log_old).exp(), advantages, 0.2, 0.28)
    return -group.sum(objective).sum() / group.mask.sum()


def dr_grpo(group: Group) -> Tensor:
    """Dr. GRPO: arXiv 2503.20783, section 3: GRPO without 1/|o_i| and without the std.

    The formula divides by G alone; the authors' code divides by the generation budget as well, and so do we.
    """
    objective = clipped_objective((group.log_pi - group.log_old).exp(), centered(group.rewards), 0.2, 0.2)
    return -group.sum(objective).sum() / (group.size * group.max_length)


def gspo(group: Group) -> Tensor:
    """GSPO: arXiv 2507.18071, Eqs. 5 to 7: the ratio is the geometric mean over the answer; clip 3e-4 and 4e-4."""
    ratio = (group.sum(group.log_pi - group.log_old) / group.lengths).exp()
    return -clipped_objective(ratio, normalized(group.rewards)[:, 0], 3e-4, 4e-4).sum() / group.size


def sapo(group: Group) -> Tensor:
    """SAPO: arXiv 2511.20347, Eqs. 5 and 6: f(r) = sigmoid(tau (r - 1)) 4 / tau; tau 1 where A > 0, 1.05 elsewhere."""
    advantages = normalized(group.rewards)
    tau = torch.where(advantages > 0, 1.0, 1.05).double()
    gate = torch.sigmoid(tau * ((group.log_pi - group.log_old).exp() - 1)) * 4 / tau
    return -(group.sum(gate * advantages) / group.lengths).sum() / group.size


def cispo(group: Group) -> Tensor:
    """CISPO: MiniMax-M1, arXiv 2506.13585, Eqs. 4 and 5: sg(clip(r)) A log pi, the mean over all tokens.

    The paper has no lower bound and does not say its upper one; r <= 5 is TRL's and among ScaleRL's (arXiv 2510.13786).
    """
    weight = (group.log_pi - group.log_old).exp().clamp(0, 5).detach()
    return -group.sum(weight * normalized(group.rewards) * group.log_pi).sum() / group.mask.sum()


def rloo(group: Group) -> Tensor:
    """RLOO: arXiv 2402.14740: 1/k sum_i (R_i - 1/(k-1) sum_{j != i} R_j) log pi(y_i), the answer being one action."""
    others = (group.rewards.sum() - group.rewards) / (group.size - 1)
    return -((group.rewards - others) * group.sum(group.log_pi)).sum() / group.size


def reinforce_tokens(group: Group) -> Tensor:
    """A log pi of each token, shape [G, L] (Williams 1992)."""
    return normalized(group.rewards) * group.log_pi


def reinforce(group: Group) -> Tensor:
    """REINFORCE (Williams 1992) with GRPO's advantage, the mean over all tokens."""
    return -group.sum(reinforce_tokens(group)).sum() / group.mask.sum()


def topr(group: Group) -> Tensor:
    """TOPR: arXiv 2503.14286, section 3: sg(alpha) R log pi(y), alpha = 1 where R >= 0, W clipped to [0, 1] else.

    W = pi(y) / mu(y) of the whole answer; R is the reward less a baseline, here the group's mean.
    """
    advantages = centered(group.rewards)[:, 0]
    weight = group.sum(group.log_pi - group.log_mu).exp().clamp(0, 1)
    alpha = torch.where(advantages >= 0, torch.ones_like(weight), weight).detach()
    return -(alpha * advantages * group.sum(group.log_pi)).sum() / group.size


def m2po_mask(group: Group, tau: float = 0.04) -> Tensor:
    """M2PO's mask, shape [G, L]: arXiv 2510.01161 v2, Algorithm 1, taken literally.

    Only trust-region tokens, A > 0 and r > 1 or A < 0 and r < 1, may be masked, and only they are in the mean. The one
    with the largest (log r)^2 goes first, until the mean of those left is at most tau. r is pi / mu.
    """
    log_ratio = (group.log_pi - group.log_mu).detach()
    advantages = normalized(group.rewards)
    moments = log_ratio.square()
    trusted = group.mask.bool() & ((advantages > 0) & (log_ratio > 0) | (advantages < 0) & (log_ratio < 0))
    keep = group.mask.bool().clone()
    while trusted.any() and moments[trusted].mean() > tau:
        worst = moments.masked_fill(~trusted, -1).argmax()
        keep.view(-1)[worst] = False
        trusted.view(-1)[worst] = False
    return keep


def m2po(group: Group) -> Tensor:
    """M2PO: arXiv 2510.01161, Eq. 5 and its footnote 2: M r A, the mean over all tokens, masked ones included."""
    ratio = (group.log_pi - group.log_mu).exp()
    return -group.sum(m2po_mask(group) * ratio * normalized(group.rewards)).sum() / group.mask.sum()


def vespo(group: Group) -> Tensor:
    """VESPO: arXiv 2602.10693, appendix I: sg(phi(W)) A log pi with W = pi(y) / mu(y), the mean over all tokens.

    phi(W) = W^c1 exp(c2 (1 - W)); (c1, c2) is (2, 3) where A >= 0, (3, 2) elsewhere. The paper writes "aggregate"; the
    mean over tokens is the authors' code's default.
    """
    advantages = normalized(group.rewards)
    weight = group.sum(group.log_pi - group.log_mu).exp()[:, None]
    phi = torch.where(advantages >= 0, weight**2 * (3 * (1 - weight)).exp(), weight**3 * (2 * (1 - weight)).exp())
    return -group.sum(phi.detach() * advantages * group.log_pi).sum() / group.mask.sum()


PAPER_LOSSES: dict[str, PaperLoss] = {
    "vespo": vespo,
    "reinforce": reinforce,
    "rloo": rloo,
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "gspo": gspo,
    "sapo": sapo,
    "cispo": cispo,
    "topr": topr,
    "m2po": m2po,
}


def tis(mismatch: Tensor, mask: Tensor) -> Tensor:
    """Truncated importance sampling: min(k, C), C = 2 (Yao et al., "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", 2025), a factor on each token's term; shape [G, L], as its argument log k.
    """
    return mismatch.exp().clamp(max=2)


def icepop(mismatch: Tensor, mask: Tensor) -> Tensor:
    """IcePop: Ring-1T, arXiv 2510.18855, Eq. 2: M(k) = k where k is in [.5, 5], else 0 (bounds: section 2.3.4)."""
    k = mismatch.exp()
    return torch.where((k >= 0.5) & (k <= 5), k, torch.zeros_like(k))


def mis(mismatch: Tensor, mask: Tensor) -> Tensor:
    """Masked importance sampling: K where K <= C, else 0, C = 2, K = prod k of the answer (Liu, Li et al., "When Speed
    Kills Stability", 2025, sequence level).
    """
    whole = (mismatch * mask).sum(1, keepdim=True).exp()
    return torch.where(whole <= 2, whole, torch.zeros_like(whole))


CORRECTIONS = {"tis": tis, "icepop": icepop, "mis": mis}


def corrected(base: str, correction: str, group: Group) -> Tensor:
    """GRPO or REINFORCE with a correction's detached factor on each token, divided as without it (Ring-1T Eq. 1).

    k is pi_old / mu. Where ``log_old`` has the values of ``log_pi``, it is pi / mu, REINFORCE's form in both blogs.
    """
    factor = CORRECTIONS[correction](group.log_old - group.log_mu, group.mask).detach()
    if base == "grpo":
        return -(group.sum(factor * grpo_tokens(group)) / group.lengths).sum() / group.size
    return -group.sum(factor * reinforce_tokens(group)).sum() / group.mask.sum()
