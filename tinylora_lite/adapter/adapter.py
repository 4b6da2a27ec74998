"""The adapter: ``W' = W + (U Σ) R Vᵀ`` with ``R = Σᵢ vᵢ Pᵢ``, beside a model that it never changes.

Each adapted ``nn.Linear`` keeps its place and its name; a forward hook adds three thin products to its output. W' is
never formed. Only v trains: everything else is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tinylora_lite.adapter.attached import Attached, adapter_of
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.layer import AddUpdate, Factors, drawn_at, factors_of, random_projection
from tinylora_lite.adapter.tying import find_target_modules, groups_of
from tinylora_lite.adapter.weights import cached_decompose, check_weight, dense_weight
from tinylora_lite.utils.distributed import hide_progress
from tinylora_lite.utils.record import describe

LARGE = 10**8
"""How many weights to decompose are worth a progress bar."""


class TinyLoraAdapter(Attached):
    """A handful of trainable parameters on a frozen model; made by :func:`attach`.

    Attributes:
        vectors: v, ``[groups, u]`` float32 whatever the model's dtype, the only trainable parameter; zero at the
            start, so that the adapted model starts equal to the base, unless ``init_std`` says otherwise. Where the
            model moves to another device, the frozen factors follow at the next forward pass, and v when
            ``adapter.to(device)`` is called.
        config: the settings.
        names: the adapted modules, by their names in ``model.named_modules()``, in tying order.
        groups: for each of them, the row of ``vectors`` that drives it.
        given: the modules whose factors were given to :func:`attach` and not computed from their weights.
        enabled: whether the update is added; :meth:`disabled` switches it off for a while.
    """

    vectors: nn.Parameter

    def __init__(
        self, model: nn.Module, config: TinyLoraConfig, given: Mapping[str, Factors], cache: str | Path | None = None
    ) -> None:
        super().__init__(model)
        self.config, self.given, self.enabled = config, frozenset(given), True
        self.names, self.groups, modules = check_modules(model, config)
        self._adapted = _all_factors(modules, self.names, config, given, cache)
        device = modules[self.names[0]].get_parameter("weight").device
        self.vectors = nn.Parameter(first_vectors(config, max(self.groups) + 1).to(device))
        float32 = config.arithmetic == "float32"
        self.freeze(model)
        self._hooks += [
            modules[name].register_forward_hook(AddUpdate(self, group, factors, float32), with_kwargs=True)
            for (name, factors), group in zip(self._adapted.items(), self.groups, strict=True)
        ]

    @property
    def num_parameters(self) -> int:
        """How many parameters train: ``groups · u``."""
        return self.vectors.numel()

    def mixing(self, name: str) -> Tensor:
        """R of one module, ``[r, r]`` float32, differentiable in ``vectors``; ``KeyError`` where it is not adapted."""
        return self.factors(name).mixing(self.vectors[self.groups[self.names.index(name)]])

    def delta(self, name: str) -> Tensor:
        """The dense update ``W' - W`` of one module, ``[out, in]`` float32; ``KeyError`` where it is not adapted."""
        factors = self.factors(name)
        return (factors.left @ self.mixing(name) @ factors.right).detach()

    def factors(self, name: str) -> Factors:
        """The frozen factors of one module, by its name; ``KeyError`` where it is not adapted."""
        if name not in self._adapted:
            raise KeyError(f"{name} is not an adapted module; adapter.names lists the {len(self.names)} that are")
        return self._adapted[name]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model computes as the untouched base (the reference policy of a KL penalty, for one)."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def identity(self, index: int = 0) -> dict[str, Any]:
        """What a run or an evaluation knows the adapter by: its settings, modules and given factors, v left out."""
        return self.known_as(self.config, {name: self._adapted[name].parts for name in sorted(self.given)})

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return describe(self.identity(), self.num_parameters)


def attach(
    model: nn.Module,
    config: TinyLoraConfig | None = None,
    *,
    factors: Mapping[str, Factors] | None = None,
    cache: str | Path | None = None,
) -> TinyLoraAdapter:
    """Puts an adapter on a model and freezes the model; names and values of its parameters stay as they are.

    Gradient checkpointing needs ``use_reentrant=False`` (the default of transformers 5). Gradients of gradients and the
    transforms of ``torch.func`` do not pass through an adapter. A quantized model (bitsandbytes, torchao) is
    dequantized one weight at a time, for the SVD alone.

    Args:
        model: any PyTorch model whose target modules are ``nn.Linear``, plain or quantized.
        config: the settings; the default is ``TinyLoraConfig()``.
        factors: of modules by name, in place of those that this library computes.
        cache: see :func:`~tinylora_lite.adapter.weights.cached_decompose`.

    Raises:
        ValueError: no module or an unknown module is targeted, a weight is smaller than the rank, on the meta
            device, not finite or quantized in an unknown format, the config's basis belongs to another model, the model
            carries an adapter already, or given factors do not fit. The model is untouched then.
    """
    if adapter_of(model) is not None:
        finds = "tinylora_lite.adapter.attached.adapter_of"
        raise ValueError(f"the model carries an adapter already; call its detach() first ({finds} finds it)")
    return TinyLoraAdapter(model, config or TinyLoraConfig(), factors or {}, cache)


def check_modules(
    model: nn.Module, config: TinyLoraConfig
) -> tuple[tuple[str, ...], tuple[int, ...], dict[str, nn.Module]]:
    """The names of the modules to adapt, their groups, and all modules; raises where :func:`attach` would."""
    targets, modules = find_target_modules(model, config.target_modules), dict(model.named_modules())
    for target in targets:
        check_weight(target.name, modules[target.name], config.rank)
    names = tuple(target.name for target in targets)
    if not isinstance(config.projection, str):
        config.projection.check_modules(names, modules)
    groups = config.groups or groups_of(targets, config.n_tie, config.tying)
    if len(groups) != len(names):
        raise ValueError(f"groups names a vector for {len(groups)} modules; the model has {len(names)} to adapt")
    return names, tuple(groups), modules


def first_vectors(config: TinyLoraConfig, groups: int) -> Tensor:
    """The v of the start, ``[groups, u]`` float32: N(0, init_std²), drawn like the P of a place that no module has."""
    if config.init_std == 0:
        return torch.zeros(groups, config.u)
    return random_projection(config.seed, 2**64 - 1, groups * config.u, 1).view(groups, config.u) * config.init_std


def _all_factors(
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    config: TinyLoraConfig,
    given: Mapping[str, Factors],
    cache: str | Path | None,
) -> dict[str, Factors]:
    weights = {name: modules[name].get_parameter("weight") for name in names}
    large = sum(weight.numel() for name, weight in weights.items() if name not in given) > LARGE
    if unknown := given.keys() - set(names):
        raise ValueError(f"factors were given for {min(unknown)}, which is not among the modules to adapt")
    for name in given:
        given[name].check(name, modules[name], config)
    found, places = {}, drawn_at(config, [modules[name] for name in names])
    for place, (name, weight) in zip(places, tqdm(weights.items(), "SVD", disable=hide_progress(large)), strict=True):
        if name in given:
            found[name] = Factors(*given[name].parts).to(weight.device)
            continue
        try:
            triplets = cached_decompose(dense_weight(modules[name]), config.rank, config.seed, cache)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        found[name] = factors_of(triplets, config, place, name)
    return found
