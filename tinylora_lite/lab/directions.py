"""Which singular directions an adapter stands on: the leading ones of the paper, or others as controls.

"The Path Not Taken" (arXiv 2511.08567) finds that reinforcement learning moves weights off their principal directions;
the TinyLoRA paper varies how many are kept, and never which.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinylora_lite.factors import LEFT_POWER, Factors
from tinylora_lite.lab.trial import Trial
from tinylora_lite.seeds import seed_of
from tinylora_lite.tying import find_sites

WHICH = ("leading", "middle", "trailing", "rotated")


def factors_along(model: nn.Module, trial: Trial) -> dict[str, Factors]:
    """The frozen factors of every adapted module, on ``trial.rank`` directions of the kind ``trial.directions``.

    Σ of the leading directions is used with every kind, so that a unit of v moves the weights equally far.

    Raises:
        ValueError: the kind is not among ``WHICH``.
    """
    if trial.directions not in WHICH:
        raise ValueError(f"directions must be one of {', '.join(WHICH)}, not {trial.directions!r}")
    modules = dict(model.named_modules())
    found = {}
    for site in find_sites(model):
        U, S, Vh = torch.linalg.svd(modules[site.name].get_parameter("weight").detach().float(), full_matrices=False)
        r, first = trial.rank, {"middle": (len(S) - trial.rank) // 2, "trailing": len(S) - trial.rank}
        if trial.directions == "rotated":
            U, Vh = _orthonormal(U.shape, site.name), _orthonormal(Vh.T.shape, site.name + " right").T
        start, power = first.get(trial.directions, 0), LEFT_POWER[trial.sigma]
        found[site.name] = Factors(
            left=(U[:, start : start + r] * S[:r] ** power).contiguous(),
            right=(S[:r, None] ** (1 - power) * Vh[start : start + r]).contiguous(),
            projection=torch.zeros(trial.u, r, r),
        )
    return found


def _orthonormal(shape: torch.Size, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed_of("rotated", name))
    Q: Tensor = torch.linalg.qr(torch.randn(shape, generator=generator))[0]
    return Q
