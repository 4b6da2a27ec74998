"""A model and its tokenizer, by name."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Quantize = Literal["nf4", "int8"]


def default_device() -> torch.device:
    """This process's own GPU where there is one (``LOCAL_RANK`` says which), the CPU otherwise."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def load_model(
    name: str,
    *,
    dtype: str = "bfloat16",
    device: torch.device | str | None = None,
    revision: str | None = None,
    quantize: Quantize | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a base for training or evaluation, in evaluation mode.

    Args:
        name: ``"nano"`` for the base that is shipped, a folder with a checkpoint of transformers, or a name on the hub.
        dtype: ``"bfloat16"``, ``"float16"``, ``"float32"``, or ``"auto"``: the checkpoint's, and float32 for ``nano``.
        device: ``None`` takes :func:`default_device`.
        revision: a commit, branch or tag on the hub.
        quantize: ``"nf4"`` or ``"int8"`` loads the linear layers through bitsandbytes.

    Raises:
        ValueError: an unknown dtype or device, or ``quantize`` of the nano base.
        OSError: no such model here or on the hub, or the hub cannot be reached; the message says what would help.
        ImportError: ``quantize`` without the extra that it needs.
    """
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"dtype must be auto, bfloat16, float16 or float32, not {dtype!r}")
    device = _checked(device or default_device())
    if is_nano(name):
        if quantize is not None:
            raise ValueError("the nano base is small enough without quantize; leave it out")
        from tinylora_lite import nano

        shipped, its_own = nano.load()
        torch.nn.Module.to(shipped, device, None if dtype == "auto" else getattr(torch, dtype))
        return shipped, its_own
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(name, revision)  # first: it is small, and finds a wrong name as well
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "revision": revision}
    if quantize is not None:
        compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        options["quantization_config"] = _quantization(quantize, compute)
    if quantize is not None or find_spec("accelerate") is not None:  # straight there, not through main memory
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise _cured(name, revision, error) from error
    if quantize is None:
        torch.nn.Module.to(model, device)
    return model.eval(), tokenizer


def is_nano(name: str) -> bool:
    """Whether a name means the base that is shipped: ``nano``, where no folder is called that."""
    return name == "nano" and not Path(name).exists()


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone, where another engine holds the model; with a pad token, whatever the checkpoint has.

    Raises:
        OSError: as :func:`load_model` does.
    """
    if is_nano(name):
        from tinylora_lite import nano

        name = str(nano.CHECKPOINTS / nano.BASE)
    try:
        return _tokenizer(name, revision)
    except (OSError, ValueError) as error:
        raise _cured(name, revision, error) from error


def _tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = Path(name) / "tokenizer_config.json"
    # AutoTokenizer goes by the model's type, and Qwen2's own class would read another tokenizer's file wrongly.
    classes = ("PreTrainedTokenizerFast", "TokenizersBackend")  # of transformers 4 and 5: whatever the file says
    own = settings.is_file() and json.loads(settings.read_text(encoding="utf-8")).get("tokenizer_class") in classes
    loader = PreTrainedTokenizerFast if own else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(name, revision=revision or "main")
    if tokenizer.pad_token_id is None:  # as Llama's, which says what to use in its place
        spare = "<|finetune_right_pad_id|>"
        tokenizer.pad_token = spare if spare in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer


def _quantization(quantize: Quantize, dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError('quantize needs bitsandbytes; pip install "tinylora_lite[quantized]" brings it') from error
    from transformers import BitsAndBytesConfig

    if quantize == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(load_in_8bit=True)


def _checked(device: torch.device | str) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"there is no device {device} here ({_first_line(error)}); cpu is always there") from error
    return torch.device(device)


def _cured(name: str, revision: str | None, error: Exception) -> OSError:
    """The error that says what would help."""
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
        "name, log in where the model asks for it (`hf auth login`), or download it and give the folder "
        "(HF_HUB_OFFLINE=1 looks into the hub's cache alone)"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
