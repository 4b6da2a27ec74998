"""The decompositions of a whole checkpoint, one weight at a time, straight from its safetensors shards.

No model is built and no more than one weight is in memory: what a machine that cannot hold the model needs to
prepare its adapters, and what fills the cache of :func:`~tinylora_lite.attach` before the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tinylora_lite.adapter.svd import Decomposition, cached_decompose
from tinylora_lite.adapter.tying import find_target_modules
from tinylora_lite.utils.distributed import hide_progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


@dataclass(frozen=True)
class _Checkpoint:
    """Where every tensor of a checkpoint lies."""

    folder: Path
    shard_of: dict[str, str]

    def read(self, name: str, device: str | torch.device) -> Tensor:
        with self._open(name) as file:
            weight: Tensor = file.get_tensor(name)
        return weight.to(device)

    def shape(self, name: str) -> list[int]:
        with self._open(name) as file:
            return list(file.get_slice(name).get_shape())

    @contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        path = self.folder / self.shard_of[name]
        try:
            with safetensors.safe_open(path, "pt") as file:
                yield file
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}); download it again") from error


def decompose_checkpoint(
    folder: str | Path,
    rank: int = 2,
    seed: int = 0,
    *,
    target_modules: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    cache: str | Path | None = None,
    progress: bool = True,
) -> Iterator[tuple[str, Decomposition]]:
    """The truncated SVD of every weight that an adapter would adapt, in tying order.

    With a cache, ``attach(model, config, cache=cache)`` finds all of them there, if rank and seed are the same and the
    model is loaded in the checkpoint's dtype or a wider one. One float32 copy of the largest weight is the most that
    is in memory beside what is yielded.

    Args:
        folder: a transformers checkpoint: ``config.json``, and ``model.safetensors`` or its shards with their index.
        rank: r of the adapters.
        seed: of the SVD's random start, ``TinyLoraConfig.seed``.
        target_modules: as in :class:`~tinylora_lite.TinyLoraConfig`.
        device: where to compute, ``"cuda"`` for instance.
        cache: a folder to keep them in; ``None`` takes the user's cache, which holds no small weights.
        progress: whether to show a bar where standard error is a terminal.

    Yields:
        The module's name in ``model.named_modules()``, and its :class:`~tinylora_lite.adapter.svd.Decomposition`.

    Raises:
        FileNotFoundError: the folder holds no config or no safetensors.
        ValueError: the checkpoint is damaged or quantized, lacks a weight, or the rank does not fit one.
    """
    checkpoint, names = _open(Path(folder), target_modules)
    for name, tensor in tqdm(names.items(), "SVD", disable=hide_progress(progress)):
        weight = checkpoint.read(tensor, device)
        try:
            yield name, cached_decompose(weight, rank, seed, cache)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def without_weights(model_or_config: nn.Module | PretrainedConfig) -> nn.Module:
    """A model as it is, or the causal language model of a configuration on the meta device.

    Raises:
        ValueError: it is neither a model nor a configuration.
    """
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    # Imported here: it takes a second, and nothing else in this file needs it.
    from transformers import AutoModelForCausalLM, PretrainedConfig

    if not isinstance(model_or_config, PretrainedConfig):
        raise ValueError(
            f"a model or a transformers configuration is needed, not {type(model_or_config).__name__}; "
            "AutoConfig.from_pretrained makes one of a name"
        )
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(model_or_config)
    return model


def _open(folder: Path, target_modules: Sequence[str] | None) -> tuple[_Checkpoint, dict[str, str]]:
    """The checkpoint, and for every module to adapt the name of its weight's tensor."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give the folder of a downloaded checkpoint")
    settings = _json(folder / "config.json")
    if "quantization_config" in settings:
        raise ValueError(f"{folder} is quantized, and only its own library can read it; attach to the loaded model")
    try:
        model = without_weights(AutoConfig.for_model(**settings))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} is no configuration that transformers knows ({error})") from error
    checkpoint = _Checkpoint(folder, _shards(folder))
    # A checkpoint of the bare decoder names its tensors without the prefix that the causal language model adds.
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {}
    for target in find_target_modules(model, target_modules):
        tensor = f"{target.name}.weight"
        found = tensor if tensor in checkpoint.shard_of else tensor.removeprefix(prefix)
        wanted = list(model.get_parameter(tensor).shape)
        if found not in checkpoint.shard_of or checkpoint.shape(found) != wanted:
            raise ValueError(f"{folder} holds no {tensor} of shape {wanted}, which its config.json asks for")
        names[target.name] = found
    return checkpoint, names


def _shards(folder: Path) -> dict[str, str]:
    if (folder / INDEX).is_file():
        shard_of = _json(folder / INDEX).get("weight_map")
        if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
            raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map of file names; download it again")
        missing = sorted({shard for shard in shard_of.values() if not (folder / shard).is_file()})
        if missing:
            raise FileNotFoundError(f"{folder} lacks {len(missing)} shards, {missing[0]} among them; download it again")
        return shard_of
    if not (folder / WHOLE).is_file():
        raise FileNotFoundError(f"{folder} holds neither {WHOLE} nor {INDEX}; save the model as safetensors")
    try:
        with safetensors.safe_open(folder / WHOLE, "pt") as file:
            return dict.fromkeys(file.keys(), WHOLE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{folder / WHOLE} is damaged ({error}); download it again") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object; download it again")
    return content
