"""Real pretrained models as bases of the lab: checkpoints in the user's cache, known by their file's hash."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

import torch

from tinylora_lite import nano
from tinylora_lite.lab.trial import REAL
from tinylora_lite.utils.record import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def kept(name: str) -> Path:
    """A folder of the lab's in the user's cache, or among temporary files where there is none."""
    return (cache_folder("lab") or Path(gettempdir()) / "tinylora_lite-lab") / name


def load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A shipped base or one of ``REAL``, float32, in evaluation mode, and its tokenizer.

    A real one is a folder in the user's cache, ``lab/bases/NAME``, that holds a checkpoint as transformers saves it and
    ``gguf.json`` with the ``sha256`` of the file that it was dequantised from.

    Raises:
        FileNotFoundError: there is no base of that name, or no checkpoint in the cache.
        ValueError: the checkpoint comes from another file.
    """
    if name not in REAL:
        return nano.load(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = kept("bases") / name
    if not (folder / "gguf.json").is_file():
        raise FileNotFoundError(f"no checkpoint of {name} in {folder}; save it there, and its file's hash in gguf.json")
    found = json.loads((folder / "gguf.json").read_text(encoding="utf-8"))["sha256"]
    if found != REAL[name]:
        raise ValueError(f"{folder} comes from a file with SHA-256 {found}; {name} is the one with {REAL[name]}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
