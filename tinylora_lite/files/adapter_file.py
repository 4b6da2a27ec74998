"""Adapter files: v, and everything that says which model and which directions it belongs to.

A file is safetensors, never pickle. What only the base can provide (its weights, their SVD) is not stored but checked.
The checks find accidents and careless edits; a file is not signed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinylora_lite.adapter.adapter import TinyLoraAdapter, attach
from tinylora_lite.adapter.basis import Basis
from tinylora_lite.adapter.config import TinyLoraConfig
from tinylora_lite.adapter.layer import Factors
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.adapter.weights import base_fingerprint
from tinylora_lite.files.basis import find_basis
from tinylora_lite.files.file_format import (
    FACTORS,
    FORMAT,
    AdapterFileError,
    Precision,
    base_dtype,
    base_name,
    checksum,
    model_of,
    names_hash,
    read_file,
    storable,
    write_safetensors,
)
from tinylora_lite.utils.record import NAMED_PROJECTIONS, base_gguf


def save(
    adapter: TinyLoraAdapter,
    path: str | Path,
    dtype: Precision = "bf16",
    *,
    factors: bool = False,
    base_sha256: str | None = None,
) -> Path:
    """Writes an adapter; the file appears whole or not at all, and saving the same adapter twice gives equal bytes.

    The file holds ``vectors``, ``[groups, u]`` in ``dtype`` (the adapter keeps its float32 values),
    :func:`decomposition`, and in its header the settings, a checksum, and what identifies the modules, the base and a
    calibrated basis. 13 parameters take 26 bytes, and their file less than 4 KiB on a model of 7 billion weights.

    The frozen factors are computed from the base again when the file is loaded. Where singular values near the cut
    are equal, machines disagree about the factors, and v would mean something else there: ``save`` then warns and
    stores the factors of those modules too, 4 bytes for each of their ``r · (in + out) + u r²`` values. So it does,
    without a warning, with factors that were given to the adapter (one from PEFT, for example).

    Args:
        adapter: attached or detached; its model must still exist.
        path: of the file, which is returned; its folder is made.
        dtype: ``"bf16"`` (the paper's, 2 bytes a parameter), ``"fp16"`` or ``"fp32"``.
        factors: whether the factors of all modules are stored, so that loading takes no SVD, and
            :class:`~tinylora_lite.engines.TinyLoraAdamW` no model.
        base_sha256: the base's fingerprint where it is known already: hashing 15 GB takes 20 seconds.

    Raises:
        ValueError: an unknown dtype, a value that is not finite or that ``dtype`` cannot hold, ``factors`` is no bool,
            or the model is gone.
    """
    if not isinstance(factors, bool):
        raise ValueError(f"factors must be True or False, not {factors!r}")
    model = model_of(adapter)
    tensors = {"vectors": storable(adapter.vectors, dtype, "the file"), "decomposition": decomposition(adapter)}
    stored = frozenset(adapter.names) if factors else _modules_to_store(adapter)
    for index, name in enumerate(adapter.names):
        for part in FACTORS if name in stored else ():
            tensors[f"{part}.{index}"] = storable(getattr(adapter.factors(name), part), "fp32", "the file")
    header = {
        "format": FORMAT,
        "settings": adapter.config.as_dict(),
        "modules": names_hash(adapter.names),
        "base": base_name(model),
        "base_revision": getattr(getattr(model, "config", None), "_commit_hash", None),
        "base_sha256": base_sha256 or base_fingerprint(model),
        "base_dtype": base_dtype(model),
    }
    if factors:  # for engines.TinyLoraAdamW, which has no model to ask
        place_of = {name: place for place, (name, _) in enumerate(model.named_modules())}
        header["layout"] = [[*of, place_of[of[0]]] for of in zip(adapter.names, adapter.groups, strict=True)]
    if gguf := base_gguf(model):
        header["base_gguf"] = gguf
    header["checksum"] = checksum(header, tensors)
    return write_safetensors(path, header, tensors)


def load(
    model: nn.Module, path: str | Path, basis: Basis | str | Path | None = None, *, cache: str | Path | None = None
) -> TinyLoraAdapter:
    """Attaches the adapter that :func:`save` wrote, in this version of the library or an earlier one.

    Its ``vectors`` are float32, equal to the stored values. A setting that the file does not name has its default.

    Args:
        model: the base it was trained on, in the dtype it was trained in or a wider one.
        path: of the file.
        basis: where the directions of a calibrated adapter are: a :class:`~tinylora_lite.Basis`, its file, or a
            folder that holds its file; ``None`` looks beside the adapter and among those that come with the package.
        cache: of decompositions; see :func:`~tinylora_lite.attach`.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: the file is damaged, foreign or edited, has a setting that this version does not know, was
            made for another base, or its basis is not found. The model is untouched then.
    """
    path = Path(path)
    header, tensors = read_file(path)
    try:
        settings = dict(header["settings"])
        if unknown := sorted(settings.keys() - {field.name for field in fields(TinyLoraConfig)}):
            raise ValueError(f"it sets {', '.join(unknown)}, unknown to this version of tinylora_lite; upgrade it")
        names = tuple(target.name for target in find_target_modules(model, settings.get("target_modules")))
        _check_base(path, model, names, header)
        if settings.get("projection", "random") not in NAMED_PROJECTIONS:
            settings["projection"] = find_basis(settings["projection"], basis, path)
        adapter = attach(model, TinyLoraConfig(**settings), factors=stored_factors(tensors, names), cache=cache)
    except AdapterFileError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path} does not fit this model: {error}") from error
    try:
        _check_tensors(path, adapter, tensors)
        with torch.no_grad():
            adapter.vectors.copy_(tensors["vectors"])
    except BaseException:
        adapter.detach()
        raise
    return adapter


def decomposition(adapter: TinyLoraAdapter) -> Tensor:
    """``[modules, 3]`` float32, what :func:`load` compares: two singular values and one probe.

    The values are the last one kept and the first one left out (zeros where the factors were given). The probe is
    ``yᵀ (UΣ) M Vᵀ x`` over the norm of ``(UΣ) M Vᵀ``, with fixed waves x and y and a fixed mixture M of the module's
    P: about 0.5 in size, it changes with any sign or rotation of singular vectors and with any other P.
    """
    rows = []
    for name in adapter.names:
        factors = adapter.factors(name)
        left, right, P = (t.detach().double().cpu() for t in (factors.left, factors.right, factors.projection))
        M = torch.einsum("u,ujk->jk", torch.cos(torch.arange(len(P), dtype=torch.float64)), P)
        y = torch.sin(torch.arange(1, len(left) + 1, dtype=torch.float64))
        x = torch.cos(torch.arange(1, right.shape[1] + 1, dtype=torch.float64))
        norm = math.sqrt(max(float(((left.T @ left @ M) * (M @ right @ right.T)).sum()), 1e-300))
        rows.append([*factors.spectrum.tolist(), float(y @ left @ M @ (right @ x)) / norm])
    return torch.tensor(rows, dtype=torch.float32)


def _modules_to_store(adapter: TinyLoraAdapter) -> frozenset[str]:
    """The modules whose factors another machine does not compute as they are here."""
    doubtful = [name for name in adapter.names if name not in adapter.given and not adapter.factors(name).portable]
    if doubtful:
        others = f" (and of {len(doubtful) - 1} others)" if len(doubtful) > 1 else ""
        warnings.warn(
            f"singular values of {doubtful[0]}{others} are too close for the same vectors on every machine; "
            "its factors are stored too",
            stacklevel=3,
        )
    return adapter.given.union(doubtful)


def stored_factors(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Factors]:
    """The factors that a file holds, of modules by their names; ``names`` are all of them in tying order."""
    indices = (int(key.partition(".")[2]) for key in tensors if key.startswith("left."))
    return {
        names[index]: Factors(tensors[f"left.{index}"], tensors[f"right.{index}"], tensors[f"projection.{index}"])
        for index in indices
    }


def _check_base(path: Path, model: nn.Module, names: tuple[str, ...], header: Mapping[str, Any]) -> None:
    made_for = f"{path} was made for {header['base'] or 'a model without a name'}"
    if names_hash(names) != header["modules"]:
        raise AdapterFileError(f"{made_for}, whose adapted modules differ from the {len(names)} of this model")
    if base_fingerprint(model) != header["base_sha256"]:
        here, there = base_dtype(model), header["base_dtype"]
        cure = f"load that base in {there}, not in {here}" if here != there else "load the base it was trained on"
        raise AdapterFileError(f"{made_for}, and this model's weights differ from that base's; {cure}")


def _check_tensors(path: Path, adapter: TinyLoraAdapter, tensors: Mapping[str, Tensor]) -> None:
    """Raises where a file's v does not fit its settings, or its weights were decomposed otherwise than here."""
    stored, here = tensors["decomposition"], decomposition(adapter)
    if tensors["vectors"].shape != adapter.vectors.shape or stored.shape not in (here.shape, (len(here), 2)):
        held, wanted = list(tensors["vectors"].shape), list(adapter.vectors.shape)
        modules = f"{len(stored)} modules, not {len(here)}"
        raise AdapterFileError(f"{path} holds vectors of shape {held} for {modules}; its settings ask for {wanted}")
    if stored.shape[1] == 2:  # the first version of the library left the first value beyond the cut out
        stored = torch.stack([stored[:, 0], here[:, 1], stored[:, 1]], dim=1)
    # The bounds are far above what float32 and an early stop of the SVD move, and far below a flipped sign.
    apart = (stored - here).abs()
    # Given factors have no singular values, and were read from this very file.
    computed = torch.tensor([name not in adapter.given for name in adapter.names])
    wrong = (computed & (apart[:, :2] > 1e-2 * here[:, :1]).any(dim=1)) | (apart[:, 2] > 0.01)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise AdapterFileError(
            f"{path} was trained on another decomposition of {adapter.names[index]} than this machine computes (its "
            f"singular values near the cut, {here[index, 0]:.6g} and {here[index, 1]:.6g}, may be too close); save it "
            "with factors=True where it was trained, or use its LoRA export"
        )
