"""GGUF, the files of llama.cpp and Ollama: a base is read from one, and an adapter is written as one."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from tinylora_lite.utils.files import CACHE_LIMIT, cache_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

DIGIT, THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
SPLITS = {"gpt-2": "", "smollm": "digits", "qwen2": DIGIT, "deepseek-r1-qwen": DIGIT, "llama-bpe": THREE_DIGITS}
"""How byte-level tokenizers split a text before they merge its bytes, by ``tokenizer.ggml.pre``.

As GPT-2's, as that and at each digit, or by ``WORDS``, with the pattern of a number.
"""

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LAYOUT = 1
"""Of what the cache keeps, in the names there. A change in how a file is read needs another number."""
CONTROL, USER_DEFINED = 3, 4
"""Of ``tokenizer.ggml.token_type``: tokens that mean something, and words that are never cut."""
CHAT_TEMPLATE = "tokenizer.chat_template"
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ENDS = ("<|endoftext|>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>")
"""Tokens that end a completion in llama.cpp, whichever of them the file calls its end."""


def gguf_sha256(file: Path) -> str:
    """SHA-256 of a file in hexadecimal; 5 GB take about 5 seconds, once in a process."""
    return _sha256(file, file.stat().st_size, file.stat().st_mtime_ns)


@cache
def _sha256(file: Path, _size: int, _changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def tokenizer_folder(file: Path) -> Path:
    """A folder with what transformers needs of a GGUF file beside its weights: configuration, tokenizer, end tokens.

    It is made once, and kept as :func:`checkpoint_folder` says.

    Raises:
        OSError: the file is no GGUF, damaged, cut short, or of a kind of model or tokenizer that is not read here.
        ImportError: gguf or accelerate is missing.
    """
    return _kept(f"{gguf_sha256(file)[:16]}-{LAYOUT}", lambda folder: _write_tokenizer(file, folder))


def checkpoint_folder(file: Path, dtype: str) -> Path:
    """The transformers checkpoint of a GGUF file, its weights dequantized and rounded once to ``dtype``.

    It is made once, and kept in ``gguf`` in the user's cache. When something is added to that, it loses what was not
    used for longest above ``CACHE_LIMIT``, other files' checkpoints only; without a cache that can be written it lasts
    as long as this process. Errors are those of :func:`tokenizer_folder`.

    Args:
        file: its weights may be quantized in any way that gguf knows.
        dtype: ``"float32"``, which holds every value exactly, ``"bfloat16"`` or ``"float16"``.
    """
    return _kept(f"{gguf_sha256(file)[:16]}-{LAYOUT}-{dtype}", lambda folder: _write_weights(file, folder, dtype))


def _write_tokenizer(file: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

    fields, tensors, stretched = _read(file)
    if (purpose := fields.get("general.type", "model")) != "model":
        raise _unread(file, f"it is of type {purpose}, not a model")
    if (parts := fields.get("split.count", 1)) > 1:
        raise OSError(f"{file} is one of {parts} parts; join them, with `llama-gguf-split --merge`")
    architecture, kind = fields.get("general.architecture"), fields.get("tokenizer.ggml.model")
    split, scaled = str(fields.get("tokenizer.ggml.pre")), fields.get(f"{architecture}.rope.scaling.type", "none")
    if kind != "gpt2":  # of SentencePiece's, transformers makes one that cuts texts otherwise than llama.cpp
        raise _unread(file, f"its tokenizer is of the kind {kind}, and only byte-level ones (gpt2) are known here")
    if split not in SPLITS:
        raise _unread(file, f"its tokenizer splits texts as {split} does, which is not known here")
    if scaled != "none":
        raise _unread(file, f"its positions are scaled ({scaled}), which transformers does not read from a GGUF file")
    with _reasons(file):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        if stretched is not None:
            config = _with_llama_3s_positions(config, fields[f"{architecture}.rope.freq_base"], stretched)
        with torch.device("meta"):
            wanted = len(list(AutoModelForCausalLM.from_config(config).parameters())) + (stretched is not None)
        backend = _byte_level_tokenizer(fields, SPLITS[split])
    if tensors != wanted:  # transformers passes over a tensor that it does not know
        raise _unread(file, f"it holds {tensors} tensors, and transformers has a place for {wanted}")
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
    tokens = {name: fields["tokenizer.ggml.tokens"][index] for name, index in ids.items() if index is not None}
    settings = {"model_max_length": config.max_position_embeddings, "chat_template": fields.get(CHAT_TEMPLATE)}
    PreTrainedTokenizerFast(tokenizer_object=backend, **tokens, **settings).save_pretrained(folder)
    ends = {ids["eos_token"], *(backend.token_to_id(token) for token in ENDS)}
    GenerationConfig(
        eos_token_id=sorted(end for end in ends if end is not None), pad_token_id=ids["pad_token"]
    ).save_pretrained(folder)
    config.save_pretrained(folder)


def _with_llama_3s_positions(config: PretrainedConfig, theta: float, factors: Tensor) -> PretrainedConfig:
    """The configuration with the scaling of Llama 3.1 and later, of which a file holds the ``factors`` of wavelengths.

    Raises ``ValueError`` where they are not the factors of such a scaling.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": factors.max().item(), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192  # as in every release of these models
    found = type(config)(**config.to_dict() | {"rope_scaling": scaling, "rope_theta": theta})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](found, torch.device("cpu"))
    plain = theta ** -torch.linspace(0, 1, len(factors) + 1)[:-1]
    if frequencies.shape != factors.shape or not torch.allclose(plain / frequencies, factors, rtol=1e-4):
        raise ValueError("its positions are scaled otherwise than those of Llama 3")
    return found


def _byte_level_tokenizer(fields: dict[str, Any], split: str) -> Tokenizer:
    """The tokenizer that a file describes; transformers would split texts for it in fewer ways than there are."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=split == THREE_DIGITS))
    by_words = split in (DIGIT, THREE_DIGITS)
    first: Any = Split(Regex(WORDS % split), "isolated") if by_words else Digits(individual_digits=True)
    then = ByteLevel(add_prefix_space=False, use_regex=not by_words)
    tokenizer.pre_tokenizer = Sequence([first, then]) if split else then
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in {CONTROL: tokenizer.add_special_tokens, USER_DEFINED: tokenizer.add_tokens}.items():
        add([AddedToken(token, normalized=False) for token, own in zip(tokens, types, strict=True) if own == kind])
    return tokenizer


def _write_weights(file: Path, folder: Path, dtype: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    # Of the bars of transformers, this alone is not switched off by disable_progress_bar().
    vars(modeling_gguf_pytorch_utils)["tqdm"] = logging.tqdm
    folder.mkdir()
    for part in tokenizer_folder(file).iterdir():
        shutil.copyfile(part, folder / part.name)  # its contents alone: the cache may be one that may only be read
    config, level = AutoConfig.from_pretrained(folder, dtype=getattr(torch, dtype)), logging.get_verbosity()
    options: dict[str, Any] = {
        "output_loading_info": True,
        "gguf_file": file.name,
        "config": config,
        "dtype": config.dtype,
    }
    logging.set_verbosity_error()  # transformers warns of packed weights, even where it unpacks them
    try:
        with _reasons(file):
            loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    finally:
        logging.set_verbosity(level)
    found, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise _unread(file, f"it lacks {len(missing)} tensors, such as {missing[0]}")
    # transformers refuses to save what it read from a GGUF file, so the weights move to a model that it made itself.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=config.dtype)
    model.load_state_dict(found.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)


def _read(file: Path) -> tuple[dict[str, Any], int, Tensor | None]:
    """What a file says of itself, how many tensors it holds, and the factors of its positions' wavelengths, if any."""
    try:
        import accelerate  # noqa: F401
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(
            f'{file.name} needs gguf and accelerate; pip install "tinylora_lite[gguf]" brings them'
        ) from error
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise OSError(f"{file} is no GGUF file; give one, or the folder of a transformers checkpoint")
    try:
        reader = GGUFReader(file)
        stretched = (torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return fields, len(reader.tensors), next(stretched, None)
    except (ArithmeticError, LookupError, MemoryError, ValueError) as error:
        raise OSError(f"{file} is damaged or was cut short ({error}); get it again") from error


def _unread(file: Path, reason: str) -> OSError:
    return OSError(f"{file} cannot be read: {reason}; give the folder of that model's transformers checkpoint")


@contextmanager
def _reasons(file: Path) -> Iterator[None]:
    """Errors of transformers, as of a kind of model that it does not know, with the file's name."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _unread(file, str(error)) from error


def _kept(name: str, write: Callable[[Path], None]) -> Path:
    """The folder of that name in the cache; ``write`` makes it, whole or not at all, where it is not there yet."""
    where = cache_folder("gguf") or Path(_temporary().name)
    if not (where / name).is_dir():
        try:
            where.mkdir(parents=True, exist_ok=True)
            (where / f".{name}.lock").touch()
        except OSError:
            where = Path(_temporary().name)
        with FileLock(where / f".{name}.lock"):  # several processes of one run ask for it at once
            if not (where / name).is_dir():
                _write(where, name, write)
    with suppress(OSError):  # in a cache that may only be read
        os.utime(where / name)
    return where / name


def _write(where: Path, name: str, write: Callable[[Path], None]) -> None:
    new = where / f".{name}.new"
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    try:
        write(new)
        new.rename(where / name)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    with suppress(FileNotFoundError):  # another process may clear up too
        kept = sorted(where.glob("[!.]*"), key=lambda entry: entry.stat().st_mtime, reverse=True)
        sizes = accumulate(sum(file.stat().st_size for file in entry.iterdir()) for entry in kept)
        for entry, total in zip(kept, sizes, strict=True):
            if total > CACHE_LIMIT and entry.name[:16] != name[:16]:  # what is in use may be larger than the limit
                shutil.rmtree(entry, ignore_errors=True)


@cache
def _temporary() -> TemporaryDirectory[str]:
    """A folder that lasts as long as this process."""
    return TemporaryDirectory(prefix="tinylora_lite-gguf-")
