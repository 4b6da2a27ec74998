"""A base and its tokenizer by name: ``nano``, the folder of a transformers checkpoint, or a name on the hub."""

from __future__ import annotations

import importlib
import json
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantize = Literal["nf4", "int8"]
DTYPES = ("auto", "bfloat16", "float16", "float32")


def default_device() -> torch.device:
    """This process's own GPU if there is one (``LOCAL_RANK`` says which), otherwise the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


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
        dtype: ``"bfloat16"``, ``"float16"``, ``"float32"``, or ``"auto"``: the checkpoint's, and float32 for ``nano``.
        device: ``None`` takes :func:`default_device`.
        revision: a commit, branch or tag on the hub.
        quantize: ``"nf4"`` or ``"int8"`` loads the linear layers through bitsandbytes.

    Raises:
        ValueError: an unknown dtype or device, or ``quantize`` of the nano base.
        OSError: no such model here or on the hub, the hub cannot be reached, or the checkpoint is damaged; the message
            says what to do.
        ImportError: ``quantize`` without the extra that it needs.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {dtype!r}")
    device = _checked(device or default_device())
    if is_nano(name):
        if quantize is not None:
            raise ValueError("the nano base is small enough without quantize; leave it out")
        dtype = "float32" if dtype == "auto" else dtype
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "revision": revision}
    if quantize is not None:
        options["quantization_config"] = _quantization(quantize, dtype)
    if quantize is not None or find_spec("accelerate") is not None:  # straight there, not through main memory
        options["device_map"] = {"": device}
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint(name), **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _cured(name, revision, error) from error
    if quantize is None:
        torch.nn.Module.to(model, device)
    model.eval()
    return model


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone; it always has a pad token.

    Raises:
        OSError: as :func:`load_model` does.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    place = checkpoint(name)
    settings = Path(place) / "tokenizer_config.json"
    try:
        # AutoTokenizer goes by the model's type, and Qwen2's own class reads another tokenizer's file wrongly.
        classes = ("PreTrainedTokenizerFast", "TokenizersBackend")  # of transformers 4 and 5: as the file says
        own = settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") in classes
        loader = PreTrainedTokenizerFast if own else AutoTokenizer
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(place, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise _cured(name, revision, error) from error
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


def _checked(device: torch.device | str) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"there is no device {device} here ({_first_line(error)}); cpu is always there") from error
    return torch.device(device)


def _cured(name: str, revision: str | None, error: Exception) -> OSError:
    """The error that names the cure."""
    from huggingface_hub import constants

    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            return OSError(f"{name} holds no config.json; give the folder of a transformers checkpoint")
        return OSError(f"{name} holds no checkpoint that transformers can load ({_first_line(error)})")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return OSError(f"no folder at {name}; give the folder of a checkpoint, or a name on the hub")
    if constants.HF_HUB_OFFLINE:
        wanted = name if revision is None else f"{name} --revision {revision}"
        return OSError(
            f"no model {name}: it is no folder here and not in the hub's cache, and HF_HUB_OFFLINE is set; unset it, "
            f"run `hf download {wanted}` where there is a network, or give the folder of a checkpoint"
        )
    return OSError(
        f"no model {name}: it is no folder here, and the hub did not give it ({_first_line(error)}); check the "
        "name, log in if the model asks for it (`hf auth login`), or download it and give the folder "
        "(HF_HUB_OFFLINE=1 uses the hub's cache alone)"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
