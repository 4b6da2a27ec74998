"""The adapter: ``W' = W + (U Σ) R Vᵀ`` with ``R = Σᵢ vᵢ Pᵢ``, beside a model that it never changes.

Each adapted ``nn.Linear`` stays where it is, under its own name; a forward hook adds three thin products to
what it puts out. W' is never formed. Only v trains: everything else is frozen.

The hooks hold the adapter, and the adapter holds the model weakly: both live as long as the model does, and an
adapter alone keeps no model in memory. A deep copy or a pickle of the model takes a copy of its adapter along.
"""

from __future__ import annotations

import copy
import hashlib
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylora_lite.basis import Basis
from tinylora_lite.config import TinyLoraConfig
from tinylora_lite.projection import random_projection
from tinylora_lite.svd import truncated_svd
from tinylora_lite.tying import Site, find_sites, groups_of

LEFT_POWER = {"left": 1.0, "split": 0.5, "right": 0.0}


@dataclass
class _Adapted:
    """One module's frozen factors, float32, ``left [out, r]``, ``right [r, in]``, ``projection [u, r²]``."""

    left: Tensor
    right: Tensor
    projection: Tensor
    group: int


class TinyLoraAdapter(nn.Module):
    """A handful of trainable numbers on a frozen model; made by :func:`attach`.

    Attributes:
        vectors: v, ``[groups, u]`` float32 whatever the model's dtype, the only trainable parameter; zero at the
            start, so that the adapted model starts equal to the base. It starts on the device of the first adapted
            module. Moving the model later is safe (the frozen factors follow it at the next forward pass), but v
            stays where it is until ``adapter.to(device)`` moves it, which saves a copy in every module.
        config: the settings.
        names: the adapted modules, by their names in ``model.named_modules()``, in tying order.
        groups: for each of them, the row of ``vectors`` that drives it.
        enabled: whether the update is added; :meth:`disabled` switches it off for a while.
    """

    vectors: nn.Parameter

    def __init__(self, model: nn.Module, config: TinyLoraConfig) -> None:
        super().__init__()
        sites = find_sites(model, config.target_modules)
        modules = dict(model.named_modules())
        _check_weights(sites, modules, config.rank)
        if isinstance(config.projection, Basis):
            config.projection.check_modules([site.name for site in sites], modules)
        self.config = config
        self.names = tuple(site.name for site in sites)
        self.groups = tuple(groups_of(sites, config.n_tie, config.tying))
        self._adapted = {
            name: self._factors(index, name, modules[name].weight, group)
            for index, (name, group) in enumerate(zip(self.names, self.groups, strict=True))
        }
        device = modules[self.names[0]].weight.device
        self.vectors = nn.Parameter(torch.zeros(max(self.groups) + 1, config.u, dtype=torch.float32, device=device))
        self.enabled = True

        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        self._hooks = [
            modules[name].register_forward_hook(_AddUpdate(self, adapted), with_kwargs=True)
            for name, adapted in self._adapted.items()
        ]

    def _factors(self, index: int, name: str, weight: Tensor, group: int) -> _Adapted:
        config = self.config
        try:
            U, S, Vh = truncated_svd(weight, config.rank, config.seed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        power = LEFT_POWER[config.sigma]
        if isinstance(config.projection, Basis):
            P = config.projection.projection(name, config.u)
        elif config.projection == "identity":
            P = torch.eye(config.u)
        else:
            P = random_projection(config.seed, index, config.u, config.rank)
        projection = P.reshape(config.u, -1).to(U.device, torch.float32)
        return _Adapted(left=U * S**power, right=S[:, None] ** (1 - power) * Vh, projection=projection, group=group)

    def _mixing(self, adapted: _Adapted) -> Tensor:
        v = self.vectors[adapted.group].to(adapted.projection.device)
        return (v @ adapted.projection).view(self.config.rank, self.config.rank)

    @property
    def num_parameters(self) -> int:
        """How many numbers train: ``groups · u``."""
        return self.vectors.numel()

    def mixing(self, name: str) -> Tensor:
        """R of one module, ``[r, r]`` float32, by its name in ``named_modules()``; differentiable in ``vectors``.

        Raises:
            KeyError: the module is not adapted.
        """
        return self._mixing(self._get(name))

    def delta(self, name: str) -> Tensor:
        """The dense update ``W' - W`` of one module, ``[out, in]`` float32, by its name in ``named_modules()``.

        Raises:
            KeyError: the module is not adapted.
        """
        adapted = self._get(name)
        return (adapted.left @ self._mixing(adapted) @ adapted.right).detach()

    def _get(self, name: str) -> _Adapted:
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
        """Takes the adapter off: the model as it was, bit for bit, its ``requires_grad`` flags included.

        The adapter keeps its numbers and its factors. Detaching twice does nothing more.
        """
        model = self._model()
        if model is not None and self._hooks:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self._trainable_before.get(name, parameter.requires_grad))
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TinyLoraAdapter:
        # .to(), .half() and their kin come through here: v follows to another device, never to a narrower dtype.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TinyLoraAdapter:
        """Of the model: an adapter on the copy. Of the adapter alone: the same numbers, attached to nothing."""
        twin: TinyLoraAdapter = object.__new__(type(self))
        memo[id(self)] = twin
        model = self._model()
        model_twin = memo.get(id(model))
        left_out = {"_model": None} | ({} if isinstance(model_twin, nn.Module) else {"_hooks": None})
        state = {key: value for key, value in self.__dict__.items() if key not in left_out}
        twin.__dict__.update({"_hooks": []}, **copy.deepcopy(state, memo))
        twin._model = weakref.ref(model_twin) if isinstance(model_twin, nn.Module) else self._model
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]
        state = state | {"_model": _no_model if model is None else weakref.ref(model)}
        super().__setstate__(state)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The settings, for ``repr``; a run that is resumed knows its adapter by them, so they are complete."""
        c = self.config
        p = c.projection
        projection = f"calibrated {p.fingerprint()[:12]}" if isinstance(p, Basis) else p
        modules = hashlib.sha256(json.dumps(self.names).encode()).hexdigest()[:8]
        return (
            f"{self.num_parameters} numbers on {len(self.names)} modules ({modules}), rank={c.rank}, u={c.u}, "
            f"n_tie={c.n_tie}, tying={c.tying}, seed={c.seed}, sigma={c.sigma}, projection={projection}"
        )


class _AddUpdate:
    """The forward hook of one module: adds ``x Vᵀ R (UΣ)`` to its output; an object, so that it can be pickled."""

    def __init__(self, adapter: TinyLoraAdapter, adapted: _Adapted) -> None:
        self.adapter, self.adapted = adapter, adapted

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        if not self.adapter.enabled:
            return output
        x, factors, dtype = args[0] if args else kwargs["input"], self.adapted, output.dtype
        if factors.left.device != x.device:
            for name in ("left", "right", "projection"):
                setattr(factors, name, getattr(factors, name).to(x.device))
        # R and v's gradient stay in float32, under autocast too: the r-dimensional middle costs nothing.
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            narrow = F.linear(x.to(dtype), factors.right.to(dtype)).float()
            narrow = F.linear(narrow, self.adapter._mixing(factors)).to(dtype)
            return output + F.linear(narrow, factors.left.to(dtype))


def attach(model: nn.Module, config: TinyLoraConfig | None = None) -> TinyLoraAdapter:
    """Puts an adapter on a model and freezes the model; names and values of its parameters stay as they are.

    With gradient checkpointing, ask for ``use_reentrant=False`` (the default of transformers 5): the reentrant
    kind passes no gradient where no input asks for one.

    Args:
        model: any PyTorch model whose target modules are ``nn.Linear`` with floating-point weights.
        config: the settings; the default is ``TinyLoraConfig()``.

    Raises:
        ValueError: no module or an unknown module is targeted, a weight is smaller than the rank, on the meta
            device, quantised or not finite, the config's basis belongs to another model, or the model carries an
            adapter already. The model is untouched then.
    """
    if adapter_of(model) is not None:
        raise ValueError(
            "the model carries an adapter already; call its detach() first (tinylora_lite.adapter.adapter_of finds it)"
        )
    return TinyLoraAdapter(model, config or TinyLoraConfig())


def adapter_of(model: nn.Module) -> TinyLoraAdapter | None:
    """The adapter that a model or a part of it carries, or ``None``."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, _AddUpdate):
                return hook.adapter
    return None


def _no_model() -> None:
    """Stands for the weak reference to a model that is gone."""


def _is_sharded(tensor: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # takes a while to import, for what few weights are

    return isinstance(tensor, DTensor)


def _check_weights(sites: list[Site], modules: dict[str, nn.Module], rank: int) -> None:
    floating = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for site in sites:
        weight = modules[site.name].get_parameter("weight")
        shape = tuple(weight.shape)
        if weight.is_meta:
            raise ValueError(f"{site.name} is on the meta device and has no values; load the weights before attach")
        if weight.dtype not in floating or weight.ndim != 2:
            raise ValueError(
                f"{site.name} holds {weight.dtype} weights of shape {shape}, as quantised layers do; "
                "load the model without quantisation (dtype=torch.bfloat16)"
            )
        if type(weight.data) is not Tensor and not _is_sharded(weight.data):
            raise ValueError(
                f"{site.name} holds a {type(weight.data).__name__}, as quantised layers do; "
                "load the model without quantisation (dtype=torch.bfloat16)"
            )
        if rank > min(shape):
            raise ValueError(f"rank={rank} is above the smaller side of {site.name}, {shape}; lower the rank")
