"""An adapter as the LoRA that llama.cpp and Ollama load beside a base in GGUF."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import Tensor

from tinylora_lite.adapter.adapter import TinyLoraAdapter
from tinylora_lite.files.file_format import base_name, model_of
from tinylora_lite.files.lora import lora_matrices
from tinylora_lite.utils.files import atomic_write

ADAPTER, MODELFILE = "adapter.gguf", "Modelfile"
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's names of kinds of models, by those of transformers."""


def export_gguf(
    adapter: TinyLoraAdapter, folder: str | Path, dtype: Literal["fp32", "fp16"] = "fp32", *, base: str | None = None
) -> Path:
    """Writes an adapter as a GGUF LoRA of rank r, the same function up to the rounding of ``dtype``.

    The folder gets ``adapter.gguf`` and a ``Modelfile``. The LoRA holds of each module ``<name>.weight.lora_a [r, in]``
    and ``<name>.weight.lora_b [out, r]``, the matrices of :func:`~tinylora_lite.export_lora` under llama.cpp's name of
    the module; ``adapter.lora.alpha`` is r, so the scale is 1. Of Llama's queries and keys the rows of B change places
    as those of the weights do in a GGUF file, which rotates neighbours where transformers rotates halves.

    llama.cpp takes it with ``llama-server -m BASE.gguf --lora adapter.gguf``, Ollama with ``ollama create NAME -f
    Modelfile``, which has not been run here. The base should be the file that the adapter was trained on; a coarser
    quantization of it changes weights by more than most adapters do.

    Args:
        adapter: attached or detached; its model, a Llama, Mistral, Qwen2 or Qwen3, must still exist.
        folder: made where it is missing; a former export in it is replaced. It is returned.
        dtype: of the stored matrices: ``"fp32"`` or ``"fp16"``.
        base: what the Modelfile names as the base, a path or a name that Ollama knows; by default the model's name.

    Raises:
        FileExistsError: the folder is a file, or holds anything else. It is untouched then.
        ValueError: another kind of model, a module that llama.cpp has no place for, an unknown dtype, a value that is
            not finite or that ``dtype`` cannot hold, or the model is gone.
        ImportError: gguf is missing.
    """
    try:
        from gguf import MODEL_ARCH_NAMES, GGUFType, GGUFWriter, get_tensor_name_map
    except ImportError as error:
        raise ImportError('a GGUF LoRA needs gguf; pip install "tinylora_lite[gguf]" brings it') from error
    folder, model = Path(folder), model_of(adapter)
    check_free(folder)
    if dtype not in ("fp32", "fp16"):
        raise ValueError(f"dtype must be fp32 or fp16, not {dtype!r}")
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", type(model).__name__))
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"a GGUF LoRA is for {', '.join(ARCHITECTURES)}, not for {kind}; export_lora serves the others"
        )
    architecture = ARCHITECTURES[kind]
    (known,) = (each for each, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(known, config.num_hidden_layers)
    with TemporaryDirectory() as temporary:
        writer = GGUFWriter(path := Path(temporary) / ADAPTER, architecture)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(adapter.config.rank))
        for module in adapter.names:
            name = names.get_name(module)
            if name is None or (name == "output" and config.tie_word_embeddings):  # it has the embeddings alone then
                raise ValueError(f"llama.cpp has no place for {module}; leave it out of target_modules")
            A, B = lora_matrices(adapter, module, dtype)
            if architecture == "llama" and name.endswith(("attn_q", "attn_k")):
                query = name.endswith("attn_q")
                B = interleaved(B, config.num_attention_heads if query else config.num_key_value_heads)
            writer.add_tensor(f"{name}.weight.lora_a", A.numpy())
            writer.add_tensor(f"{name}.weight.lora_b", B.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        atomic_write(folder / ADAPTER, path.read_bytes())
    lines = [f"FROM {base or base_name(model)}", f"ADAPTER ./{ADAPTER}", "PARAMETER temperature 0"]
    atomic_write(folder / MODELFILE, "\n".join(lines) + "\n")
    return folder


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows ``[out, in]`` of queries or keys in GGUF's order: a head's two halves, row by row in turn."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def check_free(folder: Path) -> None:
    """Raises ``FileExistsError`` where an export would overwrite something else."""
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= {ADAPTER, MODELFILE}):
        raise FileExistsError(f"{folder} exists and is no GGUF LoRA that may be replaced; name a new one")
