"""The adapter: ``W' = W + (U Σ) R Vᵀ`` with ``R = Σᵢ vᵢ Pᵢ``, beside a model that it never changes.

Each adapted ``nn.Linear`` stays where it is, under its own name; a forward hook adds three thin products to
what it puts out. W' is never formed. Only v trains: everything else is frozen.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylora_lite.config import TinyLoraConfig
from tinylora_lite.projection import random_projection
from tinylora_lite.svd import truncated_svd
from tinylora_lite.tying import MODULE_TYPES, Site, groups_of

_attached: weakref.WeakKeyDictionary[nn.Module, TinyLoraAdapter] = weakref.WeakKeyDictionary()


@dataclass
class _Adapted:
    """One adapted module: its frozen factors ``left [out, r]``, ``right [r, in]``, ``P [u, r·r]``, and its group."""

    module: nn.Linear
    left: Tensor
    right: Tensor
    projection: Tensor
    group: int


class TinyLoraAdapter(nn.Module):
    """A handful of trainable numbers on a frozen model; made by :func:`attach`.

    Attributes:
        vectors: v, ``[groups, u]`` float32, the only trainable parameter; zero at the start, so that the adapted
            model starts equal to the base.
        config: the settings.
        names: the adapted modules, by their names in ``model.named_modules()``, in tying order.
        groups: for each of them, the row of ``vectors`` that drives it.
    """

    vectors: nn.Parameter

    def __init__(self, model: nn.Module, config: TinyLoraConfig) -> None:
        super().__init__()
        sites = find_sites(model, config.target_modules)
        modules = dict(model.named_modules())
        _check_weights(sites, modules, config.rank)
        n_tie = len(sites) if config.n_tie == "all" else config.n_tie
        self.config = config
        self.names = tuple(site.name for site in sites)
        self.groups = tuple(
            groups_of(sites, n_tie, config.tying) if config.n_tie != "all" else [0] * len(sites)
        )
        self._adapted = {
            name: self._factors(index, name, modules[name], group)
            for index, (name, group) in enumerate(zip(self.names, self.groups, strict=True))
        }
        device = modules[self.names[0]].weight.device
        self.vectors = nn.Parameter(torch.zeros(max(self.groups) + 1, config.u, device=device))
        self.enabled = True

        self._model = weakref.ref(model)
        self._trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
        model.requires_grad_(False)
        self._hooks = [
            a.module.register_forward_hook(self._hook(a)) for a in self._adapted.values()
        ]
        _attached[model] = self

    def _factors(self, index: int, name: str, module: nn.Linear, group: int) -> _Adapted:
        config = self.config
        U, S, Vh = truncated_svd(module.weight, config.rank, config.seed)
        left_power = {"left": 1.0, "split": 0.5, "right": 0.0}[config.sigma]
        if config.projection == "random":
            P = random_projection(config.seed, index, config.u, config.rank)
        elif config.projection == "identity":
            P = torch.eye(config.u)
        else:
            P = config.projection.projection(name, config.u)
        return _Adapted(
            module,
            left=U * S**left_power,
            right=S[:, None] ** (1 - left_power) * Vh,
            projection=P.reshape(config.u, -1).to(U.device),
            group=group,
        )

    def _mixing(self, adapted: _Adapted) -> Tensor:
        v = self.vectors[adapted.group].to(adapted.projection.device)
        return (v @ adapted.projection).view(self.config.rank, self.config.rank)

    def _hook(self, adapted: _Adapted):
        def add_update(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not self.enabled:
                return output
            (x,) = inputs
            if adapted.left.device != x.device:
                for name in ("left", "right", "projection"):
                    setattr(adapted, name, getattr(adapted, name).to(x.device))
            narrow = F.linear(x, adapted.right.to(x.dtype)).float()
            narrow = F.linear(narrow, self._mixing(adapted))
            return output + F.linear(narrow.to(output.dtype), adapted.left.to(output.dtype))

        return add_update

    @property
    def num_parameters(self) -> int:
        """How many numbers train: ``groups · u``."""
        return self.vectors.numel()

    def mixing(self, name: str) -> Tensor:
        """R of one module, ``[r, r]`` float32, by its name in ``named_modules()``; differentiable in ``vectors``."""
        return self._mixing(self._get(name))

    def delta(self, name: str) -> Tensor:
        """The dense update ``W' - W`` of one module, ``[out, in]`` float32. Raises ``KeyError`` for other names."""
        adapted = self._get(name)
        return (adapted.left @ self._mixing(adapted) @ adapted.right).detach()

    def _get(self, name: str) -> _Adapted:
        if name not in self._adapted:
            raise KeyError(
                f"{name} is not an adapted module; adapter.names lists the {len(self.names)} that are"
            )
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
        """Takes the adapter off: the model as it was, bit for bit, its ``requires_grad`` flags included."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        model = self._model()
        if model is not None and _attached.get(model) is self:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self._trainable_before.get(name, parameter.requires_grad))
            del _attached[model]

    def extra_repr(self) -> str:
        c = self.config
        projection = c.projection if isinstance(c.projection, str) else "calibrated"
        return (
            f"{self.num_parameters} numbers on {len(self.names)} modules, rank={c.rank}, u={c.u}, n_tie={c.n_tie}, "
            f"tying={c.tying}, sigma={c.sigma}, projection={projection}"
        )


def attach(model: nn.Module, config: TinyLoraConfig | None = None) -> TinyLoraAdapter:
    """Puts an adapter on a model and freezes the model; names and values of its parameters stay as they are.

    Args:
        model: any PyTorch model whose target modules are ``nn.Linear`` with floating-point weights.
        config: the settings; the default is ``TinyLoraConfig()``.

    Raises:
        ValueError: no module or an unknown module is targeted, a weight is smaller than the rank, on the meta
            device or not floating-point, the config's basis belongs to another model, or the model carries an
            adapter already. The model is untouched then.
    """
    if model in _attached:
        raise ValueError("the model carries an adapter already; call its detach() first")
    return TinyLoraAdapter(model, config or TinyLoraConfig())


def find_sites(model: nn.Module, target_modules: Sequence[str] | None = None) -> list[Site]:
    """The modules to adapt in tying order: layer by layer, and q, k, v, o, gate, up, down inside one.

    Args:
        model: the model.
        target_modules: full names or last parts of names; ``None`` means the seven types of ``MODULE_TYPES``.

    Raises:
        ValueError: a target names no linear layer of the model.
    """
    targets = list(MODULE_TYPES if target_modules is None else target_modules)
    found: dict[str, list[str]] = {target: [] for target in targets}
    for name, module in model.named_modules():
        for target in targets:
            if isinstance(module, nn.Linear) and (name == target or name.endswith(f".{target}")):
                found[target].append(name)
                break
    missing = [target for target, names in found.items() if not names]
    if missing and (target_modules is not None or len(missing) == len(targets)):
        linear = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, m in model.named_modules()
                if isinstance(m, nn.Linear)
            }
        )
        raise ValueError(
            f"no linear layer named {', '.join(missing)} in {type(model).__name__}; "
            f"set target_modules to some of: {', '.join(linear) or 'it has no linear layers'}"
        )
    types = [
        *MODULE_TYPES,
        *dict.fromkeys(n.rsplit(".", 1)[-1] for names in found.values() for n in names),
    ]
    return sorted(
        Site(_layer_of(name), types.index(name.rsplit(".", 1)[-1]), name)
        for names in found.values()
        for name in names
    )


def _layer_of(name: str) -> int:
    number = re.search(r"\.(\d+)\.", f".{name}.")
    return int(number.group(1)) if number else -1


def _check_weights(sites: Sequence[Site], modules: dict[str, nn.Module], rank: int) -> None:
    for site in sites:
        weight = modules[site.name].weight
        if weight.is_meta:
            raise ValueError(
                f"{site.name} is on the meta device and has no values; load the weights before attach"
            )
        if not weight.is_floating_point() or weight.ndim != 2:
            raise ValueError(
                f"{site.name} holds {weight.dtype} weights of shape {tuple(weight.shape)}, as quantised layers do; "
                "load the model unquantised (torch_dtype=torch.bfloat16)"
            )
        if rank > min(weight.shape):
            raise ValueError(
                f"rank={rank} is above the size of {site.name}, {tuple(weight.shape)}; lower the rank"
            )
