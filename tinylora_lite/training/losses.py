"""The two formulas of GRPO: advantages, and the clipped policy-gradient loss.

GRPO is DeepSeekMath's (arXiv 2402.03300); arguments give Dr. GRPO (arXiv 2503.20783: no standard deviation, a constant
length normaliser), DAPO (arXiv 2503.14476: asymmetric clipping, a mean over tokens), and truncated importance weights
for a sampler whose probabilities differ from the trainer's (Yao et al. 2025, which the TinyLoRA paper follows).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinylora_lite.training.settings import Normalise, Scale


def grpo_advantages(rewards: Tensor, scale: Scale = "group", eps: float = 1e-4) -> Tensor:
    """Rewards relative to the other completions of the same prompt.

    ``A = (reward - mean of its group) / (std + eps)`` with the standard deviation (Bessel's, as TRL) of its group
    (GRPO), of the whole batch, or none (Dr. GRPO). A group whose rewards are all equal gets zeros.

    Args:
        rewards: ``[prompts, group_size]``, any real dtype.
        scale: which standard deviation divides.
        eps: keeps the division finite; TRL's value.

    Returns:
        ``[prompts, group_size]`` float32, each row of mean zero.

    Raises:
        ValueError: another shape, a group of one, a reward that is not finite, or an unknown ``scale``.

    >>> grpo_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), scale="none")
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [prompts, group_size of at least 2], not {tuple(rewards.shape)}")
    rewards = rewards.float()
    if not torch.isfinite(rewards).all():
        raise ValueError("a reward is NaN or infinite; the reward function must return finite numbers")
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale == "group":
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + eps)
    elif scale == "batch":
        advantages = advantages / (rewards.std() + eps)
    elif scale != "none":
        raise ValueError(f"scale must be group, batch or none, not {scale!r}")
    # The mean of equal numbers is not always that number in floating point.
    return advantages.masked_fill((rewards == rewards[:, :1]).all(dim=1, keepdim=True), 0.0)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalise: Normalise = "token",
    max_tokens: int | None = None,
    denominator: float | Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    tis_cap: float = 2.0,
    ref_logprobs: Tensor | None = None,
    kl: float = 0.0,
) -> Tensor:
    """The clipped policy-gradient loss over the tokens of a batch of completions.

    Per token, with ``ratio = exp(logprobs - old_logprobs)``:
    ``-w · min(ratio · A, clip(ratio, 1 - clip_low, 1 + clip_high) · A) + kl · k3``, where
    ``w = min(exp(old_logprobs - sampler_logprobs), tis_cap)`` corrects for the sampler and
    ``k3 = exp(ref - logprobs) - (ref - logprobs) - 1`` estimates the divergence from the reference policy.

    Args:
        logprobs: ``[batch, tokens]`` under the policy being trained; gradients flow through this argument alone.
        old_logprobs: ``[batch, tokens]`` under the policy before the update, in the trainer's arithmetic.
        advantages: ``[batch]``, one per completion.
        mask: ``[batch, tokens]``, 1 on completion tokens, 0 on padding, where the others may hold anything.
        clip_low: how far below 1 the ratio may go and still be rewarded.
        clip_high: how far above.
        normalise: ``"token"`` averages over all tokens (DAPO), ``"sequence"`` over each completion's tokens and then
            over completions (GRPO), ``"constant"`` divides by ``batch · max_tokens`` (Dr. GRPO).
        max_tokens: the longest completion allowed; needed by ``"constant"`` unless ``denominator`` is given.
        denominator: what the sum is divided by in place of this batch's own count, so that the losses of
            micro-batches add up to the loss of the whole; a tensor ``[batch]`` divides each completion's own sum.
        sampler_logprobs: ``[batch, tokens]`` as the sampler saw them; ``None`` leaves the correction out.
        tis_cap: the largest importance weight.
        ref_logprobs: ``[batch, tokens]`` under the reference policy; needed when ``kl > 0``.
        kl: the weight of the penalty.

    Returns:
        A scalar of ``logprobs``' dtype.

    Raises:
        ValueError: shapes that do not fit, an argument that a setting needs is missing, or an unknown ``normalise``.

    Two completions at ratio 1, so the loss is minus the mean advantage over the three tokens:

    >>> logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> grpo_loss(logprobs, logprobs, torch.tensor([1.0, -1.0]), mask)
    tensor(-0.3333)
    """
    others = {"old_logprobs": old_logprobs, "sampler_logprobs": sampler_logprobs, "ref_logprobs": ref_logprobs}
    for name, other in {"mask": mask, **others}.items():
        if other is not None and other.shape != logprobs.shape:
            raise ValueError(f"{name} is {tuple(other.shape)}, but logprobs is {tuple(logprobs.shape)}")
    if advantages.shape != logprobs.shape[:1]:
        wanted = f"[batch] = [{len(logprobs)}]"
        raise ValueError(f"advantages is {tuple(advantages.shape)}, but must be {wanted}; flatten() a group's")
    mask = mask.bool()

    def difference(a: Tensor, b: Tensor) -> Tensor:  # padding may hold infinities, and inf · 0 is NaN
        return torch.where(mask, a - b, 0.0)

    ratio = torch.exp(difference(logprobs, old_logprobs.detach()))
    A = advantages.detach()[:, None]
    per_token = -torch.min(ratio * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    if sampler_logprobs is not None:
        per_token = per_token * torch.exp(difference(old_logprobs, sampler_logprobs).detach()).clamp(max=tis_cap)
    if kl > 0:
        if ref_logprobs is None:
            raise ValueError("kl > 0 needs ref_logprobs, the log-probabilities under the reference policy")
        gap = difference(ref_logprobs.detach(), logprobs)
        per_token = per_token + kl * (torch.exp(gap) - gap - 1)
    per_token = per_token * mask
    if isinstance(denominator, Tensor):
        return (per_token.sum(dim=1) / denominator).sum()
    if normalise == "token":
        total, count = per_token.sum(), int(mask.sum())
    elif normalise == "sequence":
        total, count = (per_token.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum(), len(mask)
    elif normalise == "constant":
        if max_tokens is None and denominator is None:
            raise ValueError('normalise="constant" needs max_tokens')
        total, count = per_token.sum(), len(mask) * (max_tokens or 1)
    else:
        raise ValueError(f"normalise must be token, sequence or constant, not {normalise!r}")
    return total / (max(1, count) if denominator is None else denominator)
