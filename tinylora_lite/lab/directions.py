"""Which singular directions an adapter uses: the leading ones of the paper, or others as controls.

"The Path Not Taken" (arXiv 2511.08567) finds that reinforcement learning moves weights off their principal directions;
the TinyLoRA paper varies how many are kept, not which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylora_lite import nano
from tinylora_lite.adapter.layer import LEFT_POWER, Factors
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.lab.tasks import task_of
from tinylora_lite.lab.trial import DIRECTIONS, Trial
from tinylora_lite.sampling.sampler import ModelSampler
from tinylora_lite.training.batches import draw_prompts, rollout, score
from tinylora_lite.training.calibrate import policy_losses
from tinylora_lite.training.losses import grpo_advantages
from tinylora_lite.training.settings import GRPOSettings
from tinylora_lite.utils.record import seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBLEMS = 64
"""Training problems whose answers weight the directions of the last two kinds."""
ROWS = 64
"""Completions in one backward pass."""
RIDGE = 1e-3
"""Added to the eigenvalues of a second moment, as a share of their mean, before it is inverted."""


def factors_along(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trial: Trial) -> dict[str, Factors]:
    """The frozen factors of every adapted module, on ``trial.rank`` directions of the kind ``trial.directions``.

    ``"activations"`` takes the singular directions of ``W A^½``, with ``A`` the second moment of the module's inputs
    (SVD-LLM, arXiv 2403.07378); ``"Fisher"`` those of ``B^½ W A^½``, with ``B`` the second moment of the policy
    gradient at its outputs. All directions have length 1, and Σ of the leading ones is used with every kind, so that a
    unit of v moves the weights about equally far. Rotated ones, and the answers that weigh the last two kinds, are
    drawn from ``trial.p_seed``.

    Raises:
        ValueError: an unknown kind, or Fisher information where no answer of a base earns more than another.
    """
    if trial.directions not in DIRECTIONS:
        raise ValueError(f"directions must be one of {', '.join(DIRECTIONS)}, not {trial.directions!r}")
    names = [target.name for target in find_target_modules(model)]
    weights = {name: model.get_submodule(name).get_parameter("weight").detach().float() for name in names}
    weighted = trial.directions in ("activations", "Fisher")
    moments = _moments(model, tokenizer, trial, names) if weighted else {}
    found = {}
    for name, W in weights.items():
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        r, first = trial.rank, {"middle": (len(S) - trial.rank) // 2, "trailing": len(S) - trial.rank}
        if trial.directions == "rotated":
            U = _orthonormal(U.shape, name, trial.p_seed)
            Vh = _orthonormal(Vh.T.shape, name + " right", trial.p_seed).T
        elif weighted:
            A, B = moments[name]
            U, Vh = _weighted(W, A, B if trial.directions == "Fisher" else torch.eye(len(B)))
        start, power = first.get(trial.directions, 0), LEFT_POWER[trial.sigma]
        found[name] = Factors(
            left=(U[:, start : start + r] * S[:r] ** power).contiguous(),
            right=(S[:r, None] ** (1 - power) * Vh[start : start + r]).contiguous(),
            projection=torch.zeros(trial.u, r, r),
        )
    return found


def _orthonormal(shape: torch.Size, name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of("rotated", name, seed))
    Q: Tensor = torch.linalg.qr(torch.randn(shape, generator=generator))[0]
    return Q


def _weighted(W: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The directions of the best low-rank approximation of W where inputs weigh A and outputs B; unit columns, rows."""
    (root_A, inverse_A), (root_B, inverse_B) = _roots(A), _roots(B)
    U, _, Vh = torch.linalg.svd(root_B @ W @ root_A, full_matrices=False)
    return F.normalize(inverse_B @ U, dim=0), F.normalize(Vh @ inverse_A, dim=1)


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a second moment and its inverse, both ``[n, n]`` float32."""
    if not moment.any():
        raise ValueError("there is nothing to weigh directions by: all answers to a problem earned the same reward")
    values, vectors = torch.linalg.eigh(moment.double())
    values = (values.clamp_min(0) + RIDGE * values.mean()).sqrt()
    return ((vectors * values) @ vectors.T).float(), ((vectors / values) @ vectors.T).float()


def _moments(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trial: Trial, names: list[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of every module, the second moments of inputs and of the policy gradient at outputs, in the base's answers."""
    settings = GRPOSettings(prompts_per_step=PROBLEMS, max_new_tokens=nano.MAX_NEW_TOKENS, seed=trial.p_seed)
    task = task_of(trial.task, trial.base)
    examples = draw_prompts(task.train, settings, 0)
    rollouts = rollout(model, tokenizer, task, examples, settings, 0, ModelSampler(model, tokenizer))
    advantages = grpo_advantages(score(rollouts, task, examples, settings), "none").flatten()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            kept[name] = inputs[0], output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.enable_grad():
            for part, loss in policy_losses(model, rollouts, advantages, ROWS):
                loss.backward()
                # The prompts are read in a call of their own; the last call, whose tensors are kept, has the answers
                # up to the token before the last: those places count from which a token of the answer is predicted.
                inside = part.completion_mask[:, 1:].bool()
                for name, (x, y) in kept.items():
                    assert y.grad is not None
                    x, g = x.detach()[inside], y.grad[inside]
                    A, B = seen.get(name, (torch.zeros(()), torch.zeros(())))
                    seen[name] = A + x.T @ x, B + g.T @ g
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return seen
