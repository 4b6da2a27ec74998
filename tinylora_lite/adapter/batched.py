"""A population: many adapters on one model at once, each row of a batch computed with its own adapter's parameters.

An adapter is a handful of parameters, so a sweep over seeds, learning rates, projections and tyings need not load,
sample and train one after the other: the frozen factors U, Σ and V are shared, and only ``R = Σᵢ vᵢ Pᵢ`` differs from
row to row. An adapter gets the samples and the gradients that it would get alone, but for rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach, check_modules, first_vectors
from tinylora_lite.adapter.attached import Attached, Hook, adapters_of_rows
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.layer import Factors, drawn_at, projection_of

SHARED = ("rank", "u", "sigma", "target_modules", "arithmetic", "scale")
"""The settings that all adapters of a population have in common."""
OWN = ("seed", "learning_rate")
"""The settings of training that may differ between them."""


class Population(Attached):
    """K adapters on one frozen model; made by :func:`attach_population`.

    Attributes:
        configs: the settings of each adapter. They share rank, u, Σ's place and modules; seed, projection and tying
            are an adapter's own.
        vectors: v of each adapter, ``[groups, u]`` float32, at the start as :func:`~tinylora_lite.attach` has it.
        names: the adapted modules, in tying order.
        mixings: R of every module and adapter, ``[modules, adapters, r, r]`` float32, computed once for each pass of
            the model.
    """

    mixings: Tensor

    def __init__(self, model: nn.Module, configs: Sequence[TinyLoraConfig], factors: Mapping[str, Factors]) -> None:
        super().__init__(model)
        self.configs = tuple(configs)
        found = [check_modules(model, config) for config in configs]
        first = attach(model, configs[0], factors=factors)
        first.detach()
        self.names, _, modules = found[0]
        groups = torch.tensor([of_adapter for _, of_adapter, _ in found])  # [adapters, modules]
        sizes = groups.amax(dim=1) + 1
        starts = (first_vectors(config, int(size)) for config, size in zip(configs, sizes, strict=True))
        self.vectors = nn.ParameterList(starts)
        self._place = groups.T + sizes.cumsum(dim=0) - sizes  # [modules, adapters], into all v one after the other
        # Where every v is R itself, no P need be multiplied by: it has u · r² entries for each module.
        self._projection: Tensor | None = None  # [modules, adapters, u, r, r]
        if any(config.projection != "identity" for config in configs):
            targets = [modules[name] for name in self.names]
            drawn = [zip(drawn_at(config, targets), self.names, strict=True) for config in configs]
            of_adapters = [
                [projection_of(config, *at) for at in places] for config, places in zip(configs, drawn, strict=True)
            ]
            self._projection = torch.stack([torch.stack(of_modules) for of_modules in of_adapters], dim=1)
        self.freeze(model)
        self._hooks += [model.register_forward_pre_hook(self._mix)] + [
            modules[name].register_forward_hook(AddUpdates(self, i, first.factors(name)), with_kwargs=True)
            for i, name in enumerate(self.names)
        ]

    def __len__(self) -> int:
        return len(self.configs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Population:
        raise TypeError("a model that carries a population cannot be copied; call the population's detach() first")

    def member(self, index: int, model: nn.Module) -> TinyLoraAdapter:
        """One adapter of the population by itself, on a model that carries none: the same base, or a copy of it."""
        adapter = attach(model, self.configs[index])
        with torch.no_grad():
            adapter.vectors.copy_(self.vectors[index])
        return adapter

    def identity(self, index: int) -> dict[str, Any]:
        """What a run knows one adapter by; see :meth:`~tinylora_lite.TinyLoraAdapter.identity`."""
        return self.known_as(self.configs[index], {})

    def check_settings(self, settings: Sequence[Mapping[str, Any]]) -> None:
        """Raises ``ValueError`` unless there are settings of training for each adapter, that differ in ``OWN`` only."""
        if len(settings) != len(self):
            raise ValueError(f"the population has {len(self)} adapters, and there are settings for {len(settings)}")
        _check_shared([name for name in settings[0] if name not in OWN], settings)

    def _mix(self, module: nn.Module, args: Any) -> None:
        v = torch.cat(list(self.vectors))[self._place]  # [modules, adapters, u]
        if self._projection is None:
            self.mixings = v.unflatten(-1, [self.configs[0].rank] * 2)
        else:
            self.mixings = torch.einsum("mku,mkuij->mkij", v, self._projection)


class AddUpdates(Hook):
    """The forward hook of one module: adds ``x rightᵀ Rᵀ leftᵀ`` to its output, each row with its own adapter's R."""

    adapter: Population

    def __init__(self, population: Population, index: int, factors: Factors) -> None:
        self.adapter, self.index, self.factors = population, index, factors

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        R = self.adapter.mixings[self.index][adapters_of_rows(len(x))].to(output.dtype)
        narrow = F.linear(x, self.factors.right.to(output.dtype)) @ R.mT  # [batch, tokens, r]
        left = self.factors.left.to(output.dtype)
        return torch.addmm(output.flatten(0, 1), narrow.flatten(0, 1), left.T).view_as(output)


def attach_population(
    model: nn.Module,
    configs: Sequence[TinyLoraConfig],
    *,
    factors: Mapping[str, Factors] | None = None,
) -> Population:
    """Puts several adapters on one model and freezes it.

    ``tinylora_lite.training.loop.fit(GRPO(model, tokenizer, population, task, [settings, ...]))``, with ``GRPO`` from
    ``tinylora_lite.training.grpo``, trains them, ``tl.evaluate_population`` scores them; both set each row's adapter,
    as others do with :func:`~tinylora_lite.adapter.attached.rows_of`. It is made for models on one device whose layers
    are called as ``[batch, tokens, width]``, without gradient checkpointing.

    Args:
        model: as for :func:`~tinylora_lite.attach`.
        configs: one for each adapter, at least one. Seeds, projections and tyings may differ.
        factors: as for :func:`~tinylora_lite.attach`; left and right are used.

    Raises:
        ValueError: there is no config, the configs differ in what they must share, or whatever ``attach`` refuses. The
            model is untouched then.
    """
    if not configs:
        raise ValueError("a population needs at least one adapter; give a list of TinyLoraConfig")
    _check_shared(SHARED, [vars(config) for config in configs])
    if configs[0].arithmetic != "model":
        raise ValueError('a population computes in the model\'s dtype; use arithmetic="model"')
    return Population(model, configs, factors or {})


def _check_shared(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> None:
    for name in names:
        values = [own[name] for own in settings]
        if different := [value for value in values if value != values[0]]:
            raise ValueError(
                f"the adapters of a population share {name}, and these have {values[0]!r} and {different[0]!r}; "
                "train them apart"
            )
