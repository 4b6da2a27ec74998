"""TinyLoRA as an optimizer over an ordinary LoRA, for every engine that trains one.

With A = ``right`` and B = ``left R(v)``, frozen but for v, the LoRA computes the adapter's update, and
``∂L/∂v[g, i] = Σ ⟨∂L/∂B, left Pᵢ⟩`` over the modules of group g. The optimizer takes the gradients of B that the engine
computed, steps v in float32, and writes B back. The engine trains, samples and saves a LoRA as it always does.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.adapter.attached import adapter_of
from tinylora_lite.adapter.layer import Factors
from tinylora_lite.files.adapter_file import stored_factors
from tinylora_lite.files.file_format import AdapterFileError, model_of, read_file
from tinylora_lite.files.lora import export_lora
from tinylora_lite.sampling.policy import modes_kept
from tinylora_lite.utils.distributed import shard_like, whole

if TYPE_CHECKING:
    from peft import PeftModel

OPTIONS = ("lr", "betas", "eps", "weight_decay")


class TinyLoraAdamW(torch.optim.Optimizer):
    """AdamW on v, over the LoRA that :func:`~tinylora_lite.export_lora` or :func:`as_lora` made of an adapter.

    ``param_groups`` hold the matrices B, so that learning-rate schedulers, ``GradScaler`` and ``accelerate`` work as
    with any optimizer. The engine has averaged their gradients over the processes (DDP, FSDP2); shards are gathered.
    Where an engine clips gradients, it clips by the norm of B's, which is not v's: set its limit to 0 or very high, and
    ``max_grad_norm`` here. A gradient of exactly zero changes nothing, not even the moments, as in our loop.

    FSDP 1, DeepSpeed ZeRO and Megatron flatten or split B before an optimizer sees it, and are not supported.

    Attributes:
        vectors: v, ``[groups, u]`` float32; of an adapter that was given, its own.
        gradient_norm: of v in the last step, before it was clipped.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adapter: TinyLoraAdapter | str | Path,
        max_grad_norm: float = math.inf,
    ) -> None:
        """Writes B for the v that the adapter has, and freezes every A among the parameters.

        Args:
            params: of the model in the order of ``model.parameters()``, with their names or without, or parameter
                groups, whose options must be equal. Of those that take gradients, each module has B, or A and then B,
                and there are no others. A shows whose they are; without it the order is taken on trust.
            lr: of v; this and the next three as ``torch.optim.AdamW`` takes them, but ``weight_decay`` is off.
            betas: of its moments.
            eps: added to the root of the second moment.
            weight_decay: decoupled, of v.
            adapter: inside :func:`as_lora`, or detached; or a file that ``tl.save(adapter, file, factors=True)`` wrote.
            max_grad_norm: a longer gradient of v is shortened to it.

        Raises:
            ValueError: the parameters are not those of the adapter's LoRA, or their options differ; the adapter acts
                beside the LoRA; or an option is out of its range.
            AdapterFileError: the file is damaged or was saved without ``factors=True``.
        """
        if not max_grad_norm > 0:  # 0 switches an engine's own clipping off
            raise ValueError(f"max_grad_norm must be above 0, not {max_grad_norm}; leave it out to clip nothing")
        self.vectors, self._modules = _frozen(adapter)
        self.max_grad_norm, self.gradient_norm = max_grad_norm, 0.0
        given = list(params)
        groups = [group for group in given if isinstance(group, dict) and group["params"]] or [{"params": given}]
        if any(group | {"params": []} != groups[0] | {"params": []} for group in groups):
            raise ValueError("the parameter groups have options that differ, and v has one of each; give one group")
        parameters = [p[1] if isinstance(p, tuple) else p for group in groups for p in group["params"]]
        trainable = [p for p in parameters if p.requires_grad]
        self._right, matrices = _matrices(trainable, self._modules)
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._adam = torch.optim.AdamW([self.vectors], **defaults)
        moments = {name: torch.zeros_like(self.vectors, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        self._adam.state[self.vectors] = {"step": torch.tensor(0.0)} | moments
        super().__init__([groups[0] | {"params": matrices}], defaults)
        self._show()
        self._write()

    def __getstate__(self) -> dict[str, Any]:
        """A pickle and a deep copy hold v, too, and the factors."""
        own = ("vectors", "max_grad_norm", "gradient_norm", "_modules", "_right", "_adam")
        state: dict[str, Any] = super().__getstate__()
        return state | {name: vars(self)[name] for name in own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ``ValueError``: no other parameters train."""
        if self.param_groups:
            raise ValueError("the optimizer trains v alone; give other parameters an optimizer of their own")
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Also of every A, which PEFT makes trainable whenever it switches the LoRA off and on (for a KL penalty)."""
        super().zero_grad(set_to_none)
        for A in self._right:
            A.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of AdamW on v. Raises ``FloatingPointError``, and changes nothing, where v's gradient is not finite.

        Under ``GradScaler`` it takes gradients that were unscaled, which the scaler sees to.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
            products = self._products()
        group, v = self.param_groups[0], self.vectors
        known = [(B, whole(p.grad)) for B, p in zip(products, group["params"], strict=True) if p.grad is not None]
        v.grad = None
        if known:
            torch.autograd.backward([B for B, _ in known], [gradient.to(B.dtype) for B, gradient in known])
        self.gradient_norm = torch.nn.utils.clip_grad_norm_([v], self.max_grad_norm).item()
        if not math.isfinite(self.gradient_norm):
            raise FloatingPointError("the gradient is not finite; lower the learning rate, or load a wider dtype")
        if self.gradient_norm > 0:
            self._adam.param_groups[0] |= {name: group[name] for name in OPTIONS}
            self._adam.step()
            self._write()
        v.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of the first B is v and its moments, so that checkpoints of every engine keep them."""
        self._show()
        return super().state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores v and its moments exactly, and B. Raises ``ValueError`` where the state is another optimizer's."""
        # By its place, 0, or by a name, where torch.distributed.checkpoint wrote it.
        first = state_dict["param_groups"][0]["params"][0]
        saved, kept = state_dict["state"].get(first, {}), self._kept()
        if {name: saved[name].shape for name in saved} != {name: kept[name].shape for name in kept}:
            raise ValueError("the state is of another optimizer or another adapter; give the checkpoint of this run")
        super().load_state_dict(state_dict)  # which rounds its copies of the tensors to the dtype of B
        for name, tensor in kept.items():
            tensor.copy_(saved[name])
        self._show()
        self._write()

    def _kept(self) -> dict[str, Tensor]:
        return {"vectors": self.vectors.detach(), **self._adam.state[self.vectors]}

    def _show(self) -> None:
        """Puts v and its moments into ``state``, and again where an engine has exchanged or moved what was there."""
        first, *others = self.param_groups[0]["params"]
        self.state.clear()
        self.state.update({first: self._kept(), **{p: {} for p in others}})

    def _products(self) -> list[Tensor]:
        """B of every module, float32, differentiable in v."""
        matrices = self.param_groups[0]["params"]
        with torch.autocast(matrices[0].device.type, enabled=False):
            return [
                factors.to(p.device).left @ factors.mixing(self.vectors[group])
                for p, (_, group, factors) in zip(matrices, self._modules, strict=True)
            ]

    @torch.no_grad()
    def _write(self) -> None:
        for p, B in zip(self.param_groups[0]["params"], self._products(), strict=True):
            p.copy_(shard_like(B, p))


@contextmanager
def as_lora(adapter: TinyLoraAdapter) -> Iterator[PeftModel]:
    """Inside, the adapter's model is a PEFT model that carries it as an ordinary LoRA.

    Afterwards the model is as before, and carries the adapter with the v that :class:`TinyLoraAdamW` reached::

        adapter = tl.attach(model, config)
        with as_lora(adapter) as lora:
            optimizer = TinyLoraAdamW(lora.parameters(), lr=0.01, adapter=adapter)
            ...
        tl.save(adapter, "a.tinylora")

    Raises:
        ImportError: PEFT is not installed.
        ValueError: the adapter's model is gone, or carries a LoRA already.
    """
    if hasattr(model_of(adapter), "peft_config"):
        raise ValueError("the model carries a LoRA already; leave the other `with as_lora(...)` first, or unload it")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError('a LoRA in place of the adapter needs PEFT: pip install "tinylora_lite[peft]"') from error
    flags = [(parameter, parameter.requires_grad) for parameter in model_of(adapter).parameters()]
    with adapter.disabled(), modes_kept(model_of(adapter)):
        with tempfile.TemporaryDirectory() as folder:
            export_lora(adapter, Path(folder) / "lora")
            lora = PeftModel.from_pretrained(model_of(adapter), Path(folder) / "lora", is_trainable=True)
        try:
            yield lora
        finally:
            lora.unload()
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def _frozen(adapter: TinyLoraAdapter | str | Path) -> tuple[nn.Parameter, list[tuple[str, int, Factors]]]:
    """v; and name, group and factors of every module, in the order of the model's parameters."""
    if isinstance(adapter, TinyLoraAdapter):
        if adapter.enabled and adapter_of(model_of(adapter)) is adapter:
            raise ValueError("the adapter acts on the model beside its LoRA; stay inside `with as_lora(adapter)`")
        group_of = dict(zip(adapter.names, adapter.groups, strict=True))
        names = [name for name, _ in model_of(adapter).named_modules() if name in group_of]
        return adapter.vectors, [(name, group_of[name], adapter.factors(name)) for name in names]
    header, tensors = read_file(Path(adapter))
    if "layout" not in header:
        raise AdapterFileError(f"{adapter} holds no factors of every module; save it with factors=True")
    factors = stored_factors(tensors, [name for name, _, _ in header["layout"]])
    layout = sorted(header["layout"], key=itemgetter(2))
    return nn.Parameter(tensors["vectors"].float()), [(name, group, factors[name]) for name, group, _ in layout]


def _matrices(trainable: list[Tensor], modules: list[tuple[str, int, Factors]]) -> tuple[list[Tensor], list[Tensor]]:
    """Every A, which is compared with ``right`` and frozen, and the B of every module."""
    if len(trainable) not in (len(modules), 2 * len(modules)):
        raise ValueError(
            f"{len(trainable)} parameters take gradients, and not the {len(modules)} matrices B of the adapter's LoRA "
            f"(or its {2 * len(modules)} of A and B); load the LoRA that export_lora wrote, and train nothing else"
        )
    every = len(trainable) // len(modules)
    frozen = []
    for place, (name, _, factors) in enumerate(modules):
        *A, B = trainable[place * every : (place + 1) * every]
        same = all(a.shape == factors.right.shape and _close(whole(a.detach()), factors.right) for a in A)
        if B.shape != factors.left.shape or not same:
            raise ValueError(f"the parameters at {name} are not those of the adapter's LoRA; load the one it exported")
        frozen += A
    for a in frozen:
        a.requires_grad_(False)
    return frozen, trainable[every - 1 :: every]


def _close(A: Tensor, right: Tensor) -> bool:
    """Whether A is the frozen factor, rounded to bfloat16 or better."""
    apart = (A.float() - right.to(A.device)).norm()
    return bool(apart <= 0.01 * right.norm())
