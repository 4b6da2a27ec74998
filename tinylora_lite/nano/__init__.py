"""The nano world: a complete small world in which the effect can be seen without a hub, a GPU or an hour.

The base was trained from scratch by this package's own recipe (``python -m tinylora_lite.nano.pretrain``) to be able to
solve its problems and mostly not to; the book says what holds here by construction, and what does not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tinylora_lite.nano.task import MAX_NEW_TOKENS, reward, task, word_problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from tinylora_lite.adapter.basis import Basis

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DIRECTIONS = Path(__file__).parent / "directions"
"""The calibrated bases, each named after its base model, in whose folder vLLM would read them as weights."""
BASE = "qwen2-1m"
"""The base that is loaded where none is named."""

__all__ = ["BASE", "CHECKPOINTS", "MAX_NEW_TOKENS", "basis", "basis_file", "load", "reward", "task", "word_problems"]


def load(name: str = BASE) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A shipped base, float32, in evaluation mode, and its tokenizer. Raises ``FileNotFoundError`` for other names."""
    import torch  # here, so that what only names a base or draws problems starts without it
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = _folder(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    # AutoTokenizer would take Qwen2's own tokenizer class, which splits numbers into digits and ignores this file.
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def basis(name: str = BASE) -> Basis:
    """The calibrated basis that is shipped with a base; see :func:`basis_file`."""
    from tinylora_lite.files.basis import load_basis

    return load_basis(basis_file(name))


def basis_file(name: str = BASE) -> Path:
    """The file of :func:`basis`; raises ``FileNotFoundError`` where none is shipped with a base of this name."""
    path = DIRECTIONS / f"{_folder(name).name}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no basis is shipped with the nano base {name}; make one: tl.calibrate(*nano.load({name!r}), nano.task())"
        )
    return path


def _folder(name: str) -> Path:
    folder = CHECKPOINTS / name
    if not folder.is_dir():
        shipped = ", ".join(sorted(p.name for p in CHECKPOINTS.iterdir() if p.is_dir()))
        raise FileNotFoundError(f"no nano base named {name}; there are: {shipped}")
    return folder
