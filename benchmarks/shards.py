"""The decompositions of a whole checkpoint, one weight at a time, straight from its safetensors shards.

No model is built and no more than one weight is in memory: what a machine that cannot hold the model needs to
prepare its adapters, and what fills the cache of :func:`~tinylora_lite.attach` before the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm

from tinylora_lite.adapter.svd import Decomposition
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.adapter.weights import cached_decompose
from tinylora_lite.planning.shapes import without_weights
from tinylora_lite.utils.distributed import hide_progress


def decompose_checkpoint(
    folder: str | Path,
    rank: int = 2,
    seed: int = 0,
    *,
    target_modules: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
) -> Iterator[tuple[str, Decomposition]]:
    """The truncated SVD of every weight that an adapter would adapt, in tying order.

    With a cache, ``attach(model, config, cache=cache)`` finds all of them there, if rank and seed are the same and the
    model is loaded in the checkpoint's dtype or a wider one. One float32 copy of the largest weight is the most that
    is in memory beside what is yielded.

    Args:
        folder: a transformers checkpoint: ``config.json`` and safetensors.
        rank: r of the adapters.
        seed: of the SVD's random start, ``TinyLoraConfig.seed``.
        target_modules: as in :class:`~tinylora_lite.TinyLoraConfig`.
        device: where to compute, ``"cuda"`` for instance.
        cache: see :func:`~tinylora_lite.adapter.weights.cached_decompose`.

    Yields:
        The module's name in ``model.named_modules()``, and its :class:`~tinylora_lite.adapter.svd.Decomposition`.

    Raises:
        OSError: there is no such folder, or its ``config.json`` is damaged.
        ValueError: the checkpoint has no config, is incomplete, damaged or quantized, or the rank is too large.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        raise ValueError(f"{folder} is quantized, and only its own library can read it; attach to the loaded model")
    sources = _sources(Path(folder), without_weights(config), target_modules)
    for name, (path, tensor) in tqdm(sources.items(), "SVD", disable=hide_progress()):
        with safe_open(path, "pt", device=str(device)) as file:
            weight = file.get_tensor(tensor)
        try:
            yield name, cached_decompose(weight, rank, seed, cache)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _sources(folder: Path, model: nn.Module, target_modules: Sequence[str] | None) -> dict[str, tuple[Path, str]]:
    """Of every module to adapt, the file that holds its weight, and the tensor's name there."""
    tensors: dict[str, Path] = {}
    files, path = {"model.safetensors"}, folder / "model.safetensors.index.json"
    try:
        if path.is_file() and not (folder / "model.safetensors").is_file():  # as transformers chooses
            files = {*json.loads(path.read_bytes())["weight_map"].values()}
        for path in sorted(folder / name for name in files):
            with safe_open(path, "pt") as file:
                tensors |= dict.fromkeys(file.keys(), path)
    except (AttributeError, KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download it again, as safetensors") from error
    sources = {}
    for target in find_target_modules(model, target_modules):
        name = f"{target.name}.weight"
        # A checkpoint of the bare decoder names its tensors without the prefix that the causal language model adds.
        found = name if name in tensors else name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
        if found not in tensors:
            raise ValueError(f"{folder} holds no {name} as safetensors, which its config.json asks for")
        sources[target.name] = tensors[found], found
    return sources
