"""What is attached to a model: how an adapter or a population of adapters is found, copied and taken off again."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.weights import allow_packing, train_through
from tinylora_lite.utils.record import short_hash


class Hook:
    """What the forward hooks of this library have in common: a module that has one is adapted."""

    adapter: Attached


class Attached(nn.Module):
    """Parameters that train beside a frozen model: an adapter, or a population of them.

    The hooks on the model hold this object, and it holds the model weakly: it lives as long as the model does, and by
    itself keeps no model in memory. A pickle of the model holds a copy of it, and a deep copy does of an adapter.
    """

    names: tuple[str, ...]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
        self._hooks: list[RemovableHandle] = []

    def freeze(self, model: nn.Module) -> None:
        """Freezes the model, after all else that can fail; raises ``ValueError`` as :func:`train_through` does."""
        self._hooks += train_through(model)  # before hooks that change an output
        model.requires_grad_(False)

    def detach(self) -> None:
        """Gives the model back as it was, bit for bit, ``requires_grad`` included; parameters and factors stay."""
        model = self._model()
        if model is not None and self._hooks:
            allow_packing(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self._trainable_before.get(name, parameter.requires_grad))
        while self._hooks:
            self._hooks.pop().remove()

    def known_as(self, config: TinyLoraConfig, given: Mapping[str, Sequence[Tensor]]) -> dict[str, Any]:
        """What tells one adapter from another, as JSON holds it: settings, hashes of modules and of given factors."""
        known = {"modules": len(self.names), "modules_hash": short_hash(self.names)}
        factors = {name: [short_hash(part.tolist()) for part in parts] for name, parts in given.items()}
        known |= {"given_factors": short_hash(factors)} if factors else {}
        return {"kind": "tinylora", **config.as_dict(), **known}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(), .half() and their kin come through here: v follows to another device, never to a narrower dtype.
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of the model: attached to the copy. Of the parameters alone: the same values, attached to nothing."""
        twin: Self = object.__new__(type(self))
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


def adapter_of(model: nn.Module) -> Attached | None:
    """The adapter or the population of adapters that a model or a part of it carries, or ``None``."""
    hooks: Iterator[object] = (hook for module in model.modules() for hook in module._forward_hooks.values())
    return next((hook.adapter for hook in hooks if isinstance(hook, Hook)), None)


KEPT: ContextVar[dict[Hook, Any] | None] = ContextVar("kept", default=None)
"""What hooks have computed of parameters alone, where these stay as they are; ``None`` elsewhere."""


@contextmanager
def parameters_stay() -> Iterator[None]:
    """Inside, trained parameters do not change, so that what depends on them alone is computed once."""
    token = KEPT.set({})
    try:
        yield
    finally:
        KEPT.reset(token)


_ROWS: ContextVar[Tensor | None] = ContextVar("rows", default=None)


@contextmanager
def rows_of(adapters: Tensor | None) -> Iterator[None]:
    """Inside, row i of what a population's model is given is computed with adapter ``adapters[i]``, ``[batch]`` int64.

    ``None`` changes nothing.
    """
    token = _ROWS.set(_ROWS.get() if adapters is None else adapters)
    try:
        yield
    finally:
        _ROWS.reset(token)


def adapters_of_rows(batch: int) -> Tensor:
    """The adapter of each row that the model is computing, ``[batch]`` int64.

    Raises:
        RuntimeError: the caller of the model did not set it, or set it for another number of rows.
    """
    adapters = _ROWS.get()
    if adapters is None or len(adapters) != batch:
        problem = "for none" if adapters is None else f"for {len(adapters)}"
        raise RuntimeError(
            f"the model carries a population and is given {batch} rows, but adapters are set {problem}; "
            "call it inside tinylora_lite.adapter.attached.rows_of(...)"
        )
    return adapters
