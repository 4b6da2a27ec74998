"""Many adapters on one model at once: each row of a batch computes with the numbers of its own member.

An adapter is a handful of numbers, so a sweep over seeds, learning rates, projections and tyings need not load, sample
and train one after the other: the frozen factors U, Σ and V are shared, and only ``R = Σᵢ vᵢ Pᵢ`` differs from row to
row. A member gets the samples and the gradients that it would get alone, but for rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach, carries_updates, vector_groups
from tinylora_lite.adapter.basis import Basis
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.factors import Factors, projection_of
from tinylora_lite.adapter.layer import UpdateHook
from tinylora_lite.adapter.members import members_of_rows
from tinylora_lite.adapter.tying import find_sites

SHARED = ("rank", "u", "sigma", "target_modules", "arithmetic")
"""The settings that all members have in common."""


class Population(nn.Module):
    """K adapters on one frozen model; made by :func:`attach_population`.

    Attributes:
        configs: the settings of each member. They share rank, u, Σ's place and modules; seed, projection and tying are
            a member's own.
        vectors: v of each member, ``[groups, u]`` float32, zero at the start.
        names: the adapted modules, in tying order.
    """

    def __init__(self, model: nn.Module, configs: Sequence[TinyLoraConfig], factors: Mapping[str, Factors]) -> None:
        super().__init__()
        sites = find_sites(model, configs[0].target_modules)
        modules = dict(model.named_modules())
        self.configs = tuple(configs)
        self.names = tuple(site.name for site in sites)
        groups = [vector_groups(sites, config) for config in configs]
        self.vectors = nn.ParameterList(
            nn.Parameter(torch.zeros(max(of_member) + 1, config.u, dtype=torch.float32))
            for of_member, config in zip(groups, configs, strict=True)
        )
        firsts = torch.tensor([0, *(len(v) for v in self.vectors)]).cumsum(dim=0)[:-1]
        self._place = torch.tensor(groups).T + firsts  # [modules, members], into all vectors one after the other
        self._projection = (
            None
            if _all_identity(configs)
            else torch.stack(
                [
                    torch.stack([projection_of(config, i, name) for config in configs])
                    for i, name in enumerate(self.names)
                ]
            )
        )  # [modules, members, u, r, r]
        self._mixing: Tensor | None = None
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        self._hooks = [model.register_forward_pre_hook(self._mix)] + [
            modules[name].register_forward_hook(AddMembers(self, i, factors[name]), with_kwargs=True)
            for i, name in enumerate(self.names)
        ]

    def __len__(self) -> int:
        return len(self.configs)

    def mixings(self) -> Tensor:
        """R of every module and member, ``[modules, members, r, r]`` float32; differentiable in ``vectors``."""
        v = torch.cat(list(self.vectors))[self._place]  # [modules, members, u]
        if self._projection is None:
            rank = self.configs[0].rank
            return v.reshape(*v.shape[:-1], rank, rank)
        return torch.einsum("mku,mkuij->mkij", v, self._projection)

    def mixing_of_rows(self, module: int, batch: int) -> Tensor:
        """R of one module for each row that the model is computing, ``[batch, r, r]`` float32."""
        assert self._mixing is not None
        return self._mixing[module][members_of_rows(batch)]

    def member(self, index: int, model: nn.Module) -> TinyLoraAdapter:
        """A member as an adapter of its own, on a model that carries none: the same base, or a copy of it."""
        adapter = attach(model, self.configs[index])
        with torch.no_grad():
            adapter.vectors.copy_(self.vectors[index])
        return adapter

    def describe(self, index: int) -> str:
        """A member's settings in words, for the record of its run."""
        config = self.configs[index]
        P = config.projection
        projection = f"calibrated {P.fingerprint()[:12]}" if isinstance(P, Basis) else P
        tying = f"n_tie={config.n_tie}, tying={config.tying}" if config.groups is None else f"groups={config.groups}"
        return (
            f"{self.vectors[index].numel()} numbers on {len(self.names)} modules, rank={config.rank}, u={config.u}, "
            f"{tying}, seed={config.seed}, sigma={config.sigma}, projection={projection}"
        )

    def detach(self) -> None:
        """Takes all members off: the model as it was, bit for bit, its ``requires_grad`` flags included."""
        model = self._model()
        if model is not None and self._hooks:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self._trainable_before.get(name, parameter.requires_grad))
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _mix(self, module: nn.Module, args: Any) -> None:
        # Once for each pass of the model, and not once for each of its modules.
        self._mixing = self.mixings()


class AddMembers(UpdateHook):
    """The forward hook of one module: adds ``x rightᵀ Rᵀ leftᵀ`` to its output, each row with its own member's R."""

    def __init__(self, population: Population, index: int, factors: Factors) -> None:
        self.population, self.index, self.factors = population, index, factors

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        R = self.population.mixing_of_rows(self.index, len(x)).to(output.dtype)
        narrow = F.linear(x, self.factors.right.to(output.dtype)) @ R.mT  # [batch, tokens, r]
        return torch.addmm(output.flatten(0, 1), narrow.flatten(0, 1), self.factors.left.to(output.dtype).T).view_as(
            output
        )


def attach_population(
    model: nn.Module,
    configs: Sequence[TinyLoraConfig],
    *,
    factors: Mapping[str, Factors] | None = None,
) -> Population:
    """Puts several adapters on one model and freezes it; whoever calls the model then says whose rows it computes.

    :func:`~tinylora_lite.train_grpo`, :func:`~tinylora_lite.train_sft` and
    :func:`~tinylora_lite.evaluate` do that by themselves; others say it with
    :func:`~tinylora_lite.adapter.members.rows_belong_to`. It is made for models on one device whose layers are called
    as ``[batch, tokens, width]``, without gradient checkpointing.

    Args:
        model: as for :func:`~tinylora_lite.attach`.
        configs: one for each member, at least one. Seeds, projections and tyings may differ.
        factors: of modules by name, as for :func:`~tinylora_lite.attach`; left and right are used.

    Raises:
        ValueError: there is no member, the members differ in what they must share, the model carries an adapter, or
            whatever ``attach`` refuses. The model is untouched then.
    """
    if not configs:
        raise ValueError("a population needs at least one member; give a list of TinyLoraConfig")
    for setting in SHARED:
        values = {getattr(config, setting) for config in configs}
        if len(values) > 1:
            raise ValueError(f"members share {setting}, and these have {sorted(map(str, values))}; train them apart")
    if configs[0].arithmetic != "model":
        raise ValueError('a population computes in the model\'s dtype; use arithmetic="model"')
    if carries_updates(model):
        raise ValueError("the model carries an adapter already; call its detach() first")
    modules = dict(model.named_modules())
    for config in configs:
        if isinstance(config.projection, Basis):
            config.projection.check_modules([s.name for s in find_sites(model, config.target_modules)], modules)
    first = attach(model, configs[0], factors=factors)
    frozen = {name: first.factors(name) for name in first.names}
    first.detach()
    return Population(model, configs, frozen)


def _all_identity(configs: Sequence[TinyLoraConfig]) -> bool:
    """Whether every member's v is R itself, so that no P need be multiplied by: u · r² entries for each module."""
    return all(config.projection == "identity" for config in configs)
