"""Describe an adapter file, and what a merge into its base would make of it."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinylora_lite as tl
from tinylora_lite.cli import shared

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import Tensor

    from tinylora_lite.files.file_format import Precision
    from tinylora_lite.files.merge import MergeEffect

EXAMPLE = "tinylora inspect tinylora-demo/calibrated.tinylora --base nano"

PEFT_SETTINGS = ("r", "u", "weight_tying", "projection_seed", "save_projection", "target_modules", "peft_version")
VALUES = 256
"""A description holds at most this many values of v; of more, only their norm and extremes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora inspect``."""
    shared.add_file_arguments(parser)
    parser.add_argument("--base", help=f"{shared.BASE_HELP}; shows whether it fits, and what a merge into it keeps")
    parser.add_argument("--dtype", choices=shared.PRECISIONS, help="of the merged weights, with --base (default: bf16)")


def run(arguments: argparse.Namespace) -> None:
    """Prints the description in words and, with a base, a table of the merge; or JSON."""
    if arguments.dtype and not arguments.base:
        raise ValueError("--dtype is of a merge; say into which base with --base")
    with shared.told_warnings():
        found = describe(arguments.file, arguments.basis)
        if arguments.base:
            found |= _on_base(arguments, arguments.dtype or "bf16")
    told = {name: found[name] for name in found if name != "merge"}
    if basis := found.get("basis"):
        where = "found" if basis["found"] else "not found beside the file or in the package; give it with --basis"
        told["basis"] = f"{basis['fingerprint'][:12]}, {where}"
        told["settings"] = found["settings"] | {"projection": "calibrated"}
    words: list[RenderableType] = [shared.described(told)]
    if arguments.base:
        merge = found["merge"]
        rows = [{"module": name} | effect for name, effect in [*merge["modules"].items(), ("all", merge["total"])]]
        words += [shared.table(rows, f"A merge in {merge['dtype']}"), _verdict(merge)]
    shared.show(arguments, found, *words)


def describe(path: Path, basis: Path | None = None) -> dict[str, Any]:
    """What an adapter file of this library or a folder of PEFT holds, without its base, as JSON values.

    ``payload_bytes`` is the size of the trained parameters alone. ``stored_factors`` are the modules whose factors are
    stored: their places in tying order in a file, their names in a folder. Of a LoRA less is said.
    Raises ``AdapterFileError`` for a damaged or foreign file, or another basis.
    """
    return {"file": str(path)} | (_folder(path) if path.is_dir() else _file(path, basis))


def _file(path: Path, basis: Path | None) -> dict[str, Any]:
    from tinylora_lite.adapter.config import TinyLoraConfig
    from tinylora_lite.files.basis import find_basis
    from tinylora_lite.files.file_format import read_file
    from tinylora_lite.utils.record import NAMED_PROJECTIONS

    header, tensors = read_file(path)
    settings, vectors, calibrated = TinyLoraConfig().as_dict() | header["settings"], tensors["vectors"], None
    if settings["projection"] not in NAMED_PROJECTIONS:
        calibrated = {"fingerprint": settings["projection"], "found": True}
        try:
            find_basis(settings["projection"], basis, path)
        except tl.AdapterFileError:
            if basis is not None:
                raise
            calibrated["found"] = False
    return {
        "kind": "tinylora",
        "format": header["format"],
        "checksum": "verified",
        "bytes": path.stat().st_size,
        **_vectors(list(vectors)),
        "settings": {name: value for name, value in settings.items() if value is not None},
        "basis": calibrated,
        "modules": len(tensors["decomposition"]),
        "stored_factors": sorted(int(key.partition(".")[2]) for key in tensors if key.startswith("left.")),
        "base": {
            "name": header["base"] or None,
            "revision": header.get("base_revision"),
            "dtype": header.get("base_dtype"),
            "sha256": header["base_sha256"],
            "gguf": header.get("base_gguf"),
        },
    }


def _folder(folder: Path) -> dict[str, Any]:
    from tinylora_lite.files import peft_format

    found: dict[str, Any]
    settings = peft_format.stored_settings(folder)
    if settings.get("peft_type") == "LORA":
        tensors = peft_format.stored_tensors(folder)
        modules = {key.partition(".lora_")[0] for key in tensors}
        found = {"parameters": sum(tensor.numel() for tensor in tensors.values()), "modules": len(modules)}
    else:
        settings = peft_format.read_settings(folder).model_dump()
        by_group, parts, _ = peft_format.read_tensors(folder)
        if len({vector.shape for vector in by_group.values()}) != 1:
            raise tl.AdapterFileError(f"{folder} holds no vectors, or vectors of different lengths; get it again")
        found = {
            **_vectors([by_group[group] for group in sorted(by_group)]),
            "modules": len(parts) or None,
            "stored_factors": [name for name, held in parts.items() if "A" in held],
        }
    return {
        "kind": f"PEFT {settings['peft_type']}",
        "bytes": sum(file.stat().st_size for file in folder.glob("adapter_*")),
        **found,
        "settings": {name: settings[name] for name in PEFT_SETTINGS if settings.get(name) is not None},
        "base": {"name": settings.get("base_model_name_or_path"), "revision": settings.get("revision")},
    }


def _vectors(stored: list[Tensor]) -> dict[str, Any]:
    """The vectors, ``[u]`` each, and how they are stored."""
    import torch

    from tinylora_lite.files.file_format import DTYPES

    vectors, short = torch.stack(stored).float(), {dtype: name for name, dtype in DTYPES.items()}
    return {
        "parameters": vectors.numel(),
        "dtype": ", ".join(sorted({short.get(tensor.dtype, str(tensor.dtype)) for tensor in stored})),
        "payload_bytes": sum(tensor.nbytes for tensor in stored),
        "vectors": {
            "shape": list(vectors.shape),
            "norm": float(vectors.double().norm()),
            "smallest": float(vectors.min()),
            "largest": float(vectors.max()),
            "values": vectors.tolist() if vectors.numel() <= VALUES else None,
        },
    }


def _on_base(arguments: argparse.Namespace, precision: Precision) -> dict[str, Any]:
    """What a merge into the base would keep."""
    from tinylora_lite.files.file_format import DTYPES

    folder = shared.base_folder(arguments.base, shared.trained_with(arguments.file)[0])
    with shared.command_progress() as progress:
        _model, adapter = shared.load_adapted(arguments.file, arguments.base, arguments.basis, progress)
        progress.begin(f"merging {len(adapter.names)} modules")
        report = tl.merge_report(adapter, DTYPES[precision])
    modules = {name: _effect(effect) for name, effect in report.modules.items()}
    return {
        "fits": True,  # or an error would have been raised
        "stored_factors": [name for name in adapter.names if name in adapter.given],
        "merge": {"base": str(folder), "dtype": precision, "total": _effect(report.total), "modules": modules},
    }


def _effect(effect: MergeEffect) -> dict[str, Any]:
    values = {name: value if math.isfinite(value) else None for name, value in asdict(effect).items()}
    return values | {"flag": "lost" if effect.kept < 0.5 else "noisy" if effect.cosine < 0.9 else None}


def _verdict(merge: dict[str, Any]) -> str:
    flags, merged = [effect["flag"] for effect in merge["modules"].values()], f"A merge in {merge['dtype']}"
    spoilt = sum(flag is not None for flag in flags)
    if not spoilt:
        return f"{merged} keeps the update in all {len(flags)} modules."
    return (
        f"{merged} spoils the update in {spoilt} of {len(flags)} modules (lost: less than half of it is kept; noisy: "
        "the cosine is below 0.9); tinylora export --to lora keeps all of it."
    )
