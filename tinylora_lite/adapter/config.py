"""The settings of an adapter."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

from tinylora_lite.adapter.tying import Tying
from tinylora_lite.utils.record import NAMED_PROJECTIONS

if TYPE_CHECKING:
    from tinylora_lite.adapter.basis import Basis

Sigma = Literal["left", "split", "right"]
Arithmetic = Literal["model", "float32"]


@dataclass(frozen=True)
class TinyLoraConfig:
    """The settings of a TinyLoRA adapter: ``W' = W + (U Σ) (Σᵢ vᵢ Pᵢ) Vᵀ`` (paper, section 4).

    Attributes:
        rank: r, how many singular triplets of each weight are kept, frozen.
        u: the length of one trainable vector v. Above ``rank²`` it helps only where modules share it.
        n_tie: how many modules share one v, or ``"all"``: one v for the whole model, whatever the tying.
        tying: ``"tiled"`` ties consecutive modules whatever their type, ``"structured"`` ties modules of one type.
        seed: of the random projections P (and of the start of the SVD's iteration); 0 … 2⁶⁴ - 1.
        sigma: where Σ is: ``"left"`` beside U (the paper), ``"split"`` as √Σ on both sides (PEFT),
            ``"right"`` beside Vᵀ (the code of LoRA-XS).
        target_modules: module names, or their last parts; ``None`` takes the seven linear layers of every block.
        projection: ``"random"`` (the paper); ``"shared"``, one P with entries N(0, 1/u) for all modules whose smaller
            sides are equal (the first author's fork, github.com/jxmorris12/verl-lora at c5b65fc2); ``"identity"``,
            where v is R itself (LoRA-XS, needs ``u = rank²``); or a calibrated :class:`~tinylora_lite.Basis` (this
            project's own).
        groups: for each module in tying order, the vector that drives it, numbered from 0 without gaps, where ``n_tie``
            and ``tying`` cannot express it.
        arithmetic: ``"model"`` multiplies by the long factors in the model's dtype and by R in float32; ``"float32"``
            does all of it in float32 and adds it there, as PEFT does.
        scale: multiplies the update, as LoRA's ``lora_alpha / r`` does: ``W' = W + scale · (U Σ) R Vᵀ``.
        init_std: v starts as N(0, init_std²) of the seed's; 0 starts from the base itself.

    Raises:
        ValueError: a setting is outside its range, or does not fit another or the basis.
    """

    rank: int = 2
    u: int = 1
    n_tie: int | Literal["all"] = 1
    tying: Tying = "tiled"
    seed: int = 0
    sigma: Sigma = "left"
    target_modules: Sequence[str] | None = None
    projection: Literal["random", "shared", "identity"] | Basis = "random"
    groups: Sequence[int] | None = None
    arithmetic: Arithmetic = "model"
    scale: float = 1.0
    init_std: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("u", self.u), ("n_tie", self.n_tie)):
            if not (_is_int(value) and value >= 1) and (name, value) != ("n_tie", "all"):
                also = ' or "all"' if name == "n_tie" else ""
                raise ValueError(f"{name} must be an integer of at least 1{also}, not {value!r}")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer from 0 to 2**64 - 1, not {self.seed!r}")
        for name, kind in (("tying", Tying), ("sigma", Sigma), ("arithmetic", Arithmetic)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        if self.groups is not None:
            object.__setattr__(self, "groups", _checked_groups(self.groups))
            if (self.n_tie, self.tying) != (1, "tiled"):
                raise ValueError("groups assigns the vectors by itself; leave n_tie and tying out")
        if self.target_modules is not None:
            object.__setattr__(self, "target_modules", _checked_names(self.target_modules))
        if self.projection == "identity" and self.u != self.rank**2:
            raise ValueError(f"projection='identity' needs u = rank² = {self.rank**2}, not u={self.u}")
        for name, number, least in (("scale", self.scale, "above 0"), ("init_std", self.init_std, "of at least 0")):
            right = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
            if not right or number < 0 or (number == 0 and name == "scale"):
                raise ValueError(f"{name} must be a number {least}, not {number!r}")
        if self.projection not in NAMED_PROJECTIONS:
            if isinstance(self.projection, str) or not hasattr(self.projection, "directions"):
                raise ValueError(
                    f"projection must be {', '.join(NAMED_PROJECTIONS)} or a basis, not {self.projection!r}"
                )
            self.projection.check(rank=self.rank, u=self.u, sigma=self.sigma)

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them; a calibrated basis is its fingerprint."""
        P = self.projection if isinstance(self.projection, str) else self.projection.fingerprint()
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {"projection": P}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def lora_xs(rank: int, *, sigma: Sigma = "right", target_modules: Sequence[str] | None = None) -> TinyLoraConfig:
    """LoRA-XS (arXiv 2405.17604) as the same adapter: all ``rank²`` entries of R train in every module, none tied.

    ``sigma="right"`` is what the authors' code does; the formula of their paper is ``"left"``. See
    :class:`TinyLoraConfig` for the errors.
    """
    u = rank**2 if _is_int(rank) else 1  # a rank of another type is refused below, by name
    return TinyLoraConfig(rank=rank, u=u, sigma=sigma, target_modules=target_modules, projection="identity")


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_names(names: Any) -> tuple[str, ...]:
    in_order = sorted(names) if isinstance(names, Set) else names  # PEFT's settings hold a set
    found = tuple(in_order) if isinstance(names, Collection) and not isinstance(names, str) else ()
    if not found or not all(isinstance(name, str) and name for name in found):
        raise ValueError(f"target_modules must be a list of at least one name, or None, not {names!r}")
    return found


def _checked_groups(groups: Any) -> tuple[int, ...]:
    found = tuple(groups) if isinstance(groups, Sequence) and not isinstance(groups, str) else ()
    if not found or not all(map(_is_int, found)) or set(found) != set(range(len(set(found)))):
        raise ValueError(f"groups must be integers from 0 without gaps, one for each module, not {groups!r}")
    return found
