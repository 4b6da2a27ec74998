"""Real pretrained models as bases of the lab: GGUF files, known by their hash."""

from __future__ import annotations

from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING

from tinylora_lite import nano
from tinylora_lite.experiment.models import PACKAGES, gguf_file, load_model, load_tokenizer
from tinylora_lite.files.gguf import gguf_sha256
from tinylora_lite.lab.trial import DTYPES, REAL
from tinylora_lite.utils.files import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def kept(name: str) -> Path:
    """A folder of the lab's in the user's cache, or among temporary files where there is none."""
    return (cache_folder("lab") or Path(gettempdir()) / "tinylora_lite-lab") / name


def load_base(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A shipped base or one of ``REAL``, in evaluation mode, and its tokenizer.

    The file of a real one is ``lab/bases/NAME.gguf`` in the user's cache, or comes with a package
    (:data:`~tinylora_lite.experiment.models.PACKAGES`).

    Raises:
        OSError: the file is not there, its package is not installed, or there is no shipped base of that name.
        ValueError: it is another file.
    """
    if name not in REAL:
        return nano.load(name)
    own = kept("bases") / f"{name}.gguf"
    file = own if own.is_file() or name not in PACKAGES else gguf_file(name)
    if file is None or not file.is_file():
        raise FileNotFoundError(f"{name} is read from {own}; put the GGUF file with SHA-256 {REAL[name]} there")
    if (found := gguf_sha256(file)) != REAL[name]:
        raise ValueError(f"{file} has the SHA-256 {found}; {name} is the one with {REAL[name]}")
    return load_model(str(file), dtype=DTYPES.get(name, "float32"), device="cpu"), load_tokenizer(str(file))
