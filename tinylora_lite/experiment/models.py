"""A base and its tokenizer by name: ``nano``, the folder of a transformers checkpoint, or a name on the hub."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import constants
from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantize = Literal["nf4", "int8"]
DTYPES = ("auto", "bfloat16", "float16", "float32")


def nano_package() -> ModuleType:
    """:mod:`tinylora_lite.nano`, imported by name, because it is built on the packages below this one."""
    return importlib.import_module("tinylora_lite.nano")


def is_nano(name: str) -> bool:
    """Whether a name means the shipped base: ``nano``, unless a folder has that name."""
    return name == "nano" and not Path(name).exists()


def checkpoint(name: str) -> str:
    """What transformers and vLLM load for a name: the shipped checkpoint's folder for ``nano``, else the name."""
    if not is_nano(name):
        return name
    nano = nano_package()
    return str(nano.CHECKPOINTS / nano.BASE)


def load_model(
    name: str,
    *,
    dtype: str = "bfloat16",
    device: torch.device | str | None = None,
    revision: str | None = None,
    quantize: Quantize | None = None,
) -> PreTrainedModel:
    """Loads a base in evaluation mode.

    Args:
        name: ``"nano"`` for the shipped base, a folder with a checkpoint of transformers, or a name on the hub.
        dtype: a name of ``DTYPES``; ``"auto"`` is the checkpoint's, and float32 for ``nano``.
        device: ``None`` takes this process's own GPU (``LOCAL_RANK`` says which) if there is one, otherwise the CPU.
        revision: a commit, branch or tag on the hub.
        quantize: ``"nf4"`` or ``"int8"`` loads the linear layers through bitsandbytes.

    Raises:
        ValueError: no such device, or ``quantize`` of ``nano``.
        OSError: no such model here or on the hub, the hub cannot be reached, or the checkpoint is damaged.
        ImportError: ``quantize`` without the extra that it needs.
    """
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"there is no device {device} here ({error}); cpu is always there") from error
    if is_nano(name):
        if quantize is not None:
            raise ValueError("the nano base is small enough without quantize; leave it out")
        dtype = "float32" if dtype == "auto" else dtype  # of its training; the checkpoint is in float16
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "revision": revision}
    if quantize is not None:
        options["quantization_config"] = _quantization(quantize, dtype)
    if quantize is not None or find_spec("accelerate") is not None:  # straight there, not through main memory
        options["device_map"] = {"": device}
    from transformers import AutoModelForCausalLM

    with _loading(name):
        model = AutoModelForCausalLM.from_pretrained(checkpoint(name), **options)
    if quantize is None:
        torch.nn.Module.to(model, device)
    model.eval()
    return model


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer; it always has a pad token. Raises ``OSError`` as :func:`load_model` does."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = Path(checkpoint(name)) / "tokenizer_config.json"
    # AutoTokenizer goes by the model's type, and Qwen2's own class reads another tokenizer's file wrongly.
    classes = ("PreTrainedTokenizerFast", "TokenizersBackend")  # of transformers 4 and 5: as the file says
    with _loading(name):
        own = settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") in classes
        loader = PreTrainedTokenizerFast if own else AutoTokenizer
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(checkpoint(name), revision=revision or "main")
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
        cure = "give the folder of a transformers checkpoint, or a name on the hub"
        if Path(name).is_dir():
            message = message if (Path(name) / "config.json").is_file() else f"{name} holds no config.json"
        elif name.startswith((".", "/", "~")) or name.count("/") > 1:
            message = f"no folder at {name}"
        elif constants.HF_HUB_OFFLINE:
            message = f"{name} is no folder here and not in the hub's cache, and HF_HUB_OFFLINE is set"
            cure = f"unset it, run `hf download {name}` where there is a network, or give the folder of a checkpoint"
        else:
            cure += ", after `hf auth login` where it asks for that"
        raise OSError(f"{message}; {cure}") from error
