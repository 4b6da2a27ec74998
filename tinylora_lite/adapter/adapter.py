"""The adapter: ``W' = W + (U Σ) R Vᵀ`` with ``R = Σᵢ vᵢ Pᵢ``, beside a model that it never changes.

Each adapted ``nn.Linear`` keeps its place and its name; a forward hook adds three thin products to its output. W' is
never formed. Only v trains: everything else is frozen.

The hooks hold the adapter, and the adapter holds the model weakly: both live as long as the model does, and an
adapter alone keeps no model in memory. A deep copy or a pickle of the model takes a copy of its adapter along.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.layer import AddUpdate, Factors, Hook, factors_of
from tinylora_lite.adapter.svd import cached_decompose
from tinylora_lite.adapter.tying import find_target_modules, groups_of
from tinylora_lite.adapter.weights import allow_packing, check_weight, dense_weight, train_through, weight_shape
from tinylora_lite.utils.distributed import hide_progress
from tinylora_lite.utils.record import describe, short_hash

LARGE = 10**8
"""How many weights to decompose are worth a progress bar."""


class TinyLoraAdapter(nn.Module):
    """A handful of trainable parameters on a frozen model; made by :func:`attach`.

    Attributes:
        vectors: v, ``[groups, u]`` float32 whatever the model's dtype, the only trainable parameter; zero at the
            start, so that the adapted model starts equal to the base. Where the model moves to another device, the
            frozen factors follow at the next forward pass, and v when ``adapter.to(device)`` is called.
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
        super().__init__()
        self.config, self.given, self.enabled = config, frozenset(given), True
        self.names, self.groups, modules = check_modules(model, config)
        if unknown := given.keys() - set(self.names):
            raise ValueError(f"factors were given for {min(unknown)}, which is not among the modules to adapt")
        self._adapted = _all_factors(modules, self.names, config, given, cache)
        device = modules[self.names[0]].get_parameter("weight").device
        self.vectors = nn.Parameter(torch.zeros(max(self.groups) + 1, config.u, dtype=torch.float32, device=device))

        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
        # Before the updates' hooks, which change a layer's output, and before the freeze: it may refuse the model.
        through = train_through(model)
        model.requires_grad_(False)
        float32 = config.arithmetic == "float32"
        self._hooks = through + [
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

    def detach(self) -> None:
        """Takes the adapter off: the model as it was, bit for bit, ``requires_grad`` included; v and factors stay."""
        model = self._model()
        if model is not None and self._hooks:
            allow_packing(model)
        take_off(model, self._hooks, self._trainable_before)

    def identity(self, index: int = 0) -> dict[str, Any]:
        """What a run or an evaluation knows the adapter by: its settings, modules and given factors, v left out."""
        return identity(self.config, self.names, {name: self._adapted[name] for name in sorted(self.given)})

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return describe(self.identity(), self.num_parameters)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TinyLoraAdapter:
        # .to(), .half() and their kin come through here: v follows to another device, never to a narrower dtype.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TinyLoraAdapter:
        """Of the model: an adapter on the copy. Of the adapter alone: the same v, attached to nothing."""
        twin: TinyLoraAdapter = object.__new__(type(self))
        model, memo[id(self)] = self._model(), twin
        hooks = self._hooks if id(model) in memo else []
        state = copy.deepcopy(self.__dict__ | {"_model": None, "_hooks": hooks}, memo)
        twin.__setstate__(state | {"_model": memo.get(id(model), model)})
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]
        state = state | {"_model": (lambda: None) if model is None else weakref.ref(model)}
        super().__setstate__(state)  # type: ignore[no-untyped-call]


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
        cache: see :func:`~tinylora_lite.adapter.svd.cached_decompose`.

    Raises:
        ValueError: no module or an unknown module is targeted, a weight is smaller than the rank, on the meta
            device, not finite or quantized in an unknown format, the config's basis belongs to another model, the model
            carries an adapter already, or given factors do not fit. The model is untouched then.
    """
    if carries_updates(model):
        finds = "tinylora_lite.adapter.adapter.adapter_of"
        raise ValueError(f"the model carries an adapter already; call its detach() first ({finds} finds it)")
    return TinyLoraAdapter(model, config or TinyLoraConfig(), factors or {}, cache)


def adapter_of(model: nn.Module) -> TinyLoraAdapter | None:
    """The adapter that a model or a part of it carries, or ``None``."""
    hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
    found = next((hook.adapter for hook in hooks if isinstance(hook, AddUpdate)), None)
    return found if isinstance(found, TinyLoraAdapter) else None


def carries_updates(model: nn.Module) -> bool:
    """Whether a model carries an adapter or a population of adapters."""
    return any(isinstance(hook, Hook) for module in model.modules() for hook in module._forward_hooks.values())


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


def take_off(model: nn.Module | None, hooks: list[Any], trainable: Mapping[str, bool]) -> None:
    """Removes the hooks and gives the model's parameters the ``requires_grad`` flags that they had."""
    for name, parameter in model.named_parameters() if model is not None and hooks else ():
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
    while hooks:
        hooks.pop().remove()


def identity(config: TinyLoraConfig, names: Sequence[str], given: Mapping[str, Factors]) -> dict[str, Any]:
    """What tells one adapter from another, as JSON holds it: settings, hashes of the modules and of given factors."""
    factors = {name: [short_hash(part.tolist()) for part in given[name].parts] for name in given}
    return {"kind": "tinylora", **config.as_dict(), "modules": len(names), "modules_hash": short_hash(names)} | (
        {"given_factors": short_hash(factors)} if factors else {}
    )


def _all_factors(
    modules: Mapping[str, nn.Module],
    names: Sequence[str],
    config: TinyLoraConfig,
    given: Mapping[str, Factors],
    cache: str | Path | None,
) -> dict[str, Factors]:
    weights = {name: modules[name].get_parameter("weight") for name in names}
    large = sum(weight.numel() for name, weight in weights.items() if name not in given) > LARGE
    found = {}
    for name in given:
        given[name].check(name, weight_shape(modules[name]), config)
    for index, (name, weight) in enumerate(tqdm(weights.items(), "SVD", disable=hide_progress(large))):
        if name in given:
            found[name] = Factors(*given[name].parts).to(weight.device)
            continue
        try:
            triplets = cached_decompose(dense_weight(modules[name]), config.rank, config.seed, cache)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        found[name] = factors_of(triplets, config, index, name)
    return found
