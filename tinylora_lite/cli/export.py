"""Write an adapter in another form: a LoRA of the same function, PEFT's TinyLoRA, or a merged checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tinylora_lite as tl
from tinylora_lite.cli import shared

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tinylora_lite.files.file_format import Precision
    from tinylora_lite.view.progress import Progress

EXAMPLE = "tinylora export tinylora-demo/calibrated.tinylora --base nano --to lora --out calibrated-lora"

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
)
"""Copied as they are: a tokenizer that is loaded and saved again is not always the same."""

NANO_NOTE = "load the nano tokenizer with transformers.PreTrainedTokenizerFast{}; AutoTokenizer would take Qwen2's own"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora export``."""
    shared.add_file_arguments(parser)
    add = parser.add_argument
    add("--base", required=True, help=shared.BASE_HELP)
    forms = "a LoRA for PEFT and vLLM or for llama.cpp and Ollama, PEFT's TinyLoRA, a checkpoint with the update inside"
    add("--to", required=True, choices=("lora", "gguf-lora", "peft", "merged"), help=forms)
    add("--out", required=True, type=Path, metavar="FOLDER", help="where it goes")
    precisions = "of lora and gguf-lora (default: fp32) or merged (default: that of the training)"
    add("--dtype", choices=shared.PRECISIONS, help=precisions)


def run(arguments: argparse.Namespace) -> None:
    """Prints what was written and, of a LoRA, how vLLM or llama.cpp serves it; or JSON."""
    from tinylora_lite import nano
    from tinylora_lite.experiment.models import gguf_file
    from tinylora_lite.utils.files import cache_folder

    to, out = arguments.to, arguments.out
    if arguments.dtype and to == "peft":
        raise ValueError("--dtype is of lora, gguf-lora and merged; PEFT's TinyLoRA is float32")
    _check_out(out, to)
    base = shared.base_folder(arguments.base, shared.trained_with(arguments.file)[0])
    file, is_nano = gguf_file(arguments.base), base.resolve().is_relative_to(nano.CHECKPOINTS.resolve())
    merge = serve = note = None
    if is_nano and to in ("lora", "merged"):
        note = NANO_NOTE.format(" and send vLLM token ids" * (to == "lora"))
    with shared.command_progress() as progress, shared.told_warnings():
        model, adapter = shared.load_adapted(arguments.file, arguments.base, arguments.basis, progress)
        if to == "merged":
            merge = _write_merged(model, adapter, base, out, arguments.dtype, progress)
        else:
            progress.begin("writing")
            if to == "lora":
                tl.export_lora(adapter, out, arguments.dtype or "fp32")
                if file is None or base.parent == cache_folder("gguf"):  # else the checkpoint ends with this process
                    serve = _serve(base, out, arguments.file.stem, adapter.config.rank, is_nano)
            elif to == "gguf-lora":
                tl.export_gguf(adapter, out, arguments.dtype or "fp32", base=str((file or base).resolve()))
                if file is not None:
                    lora = str(out.resolve() / "adapter.gguf")
                    serve = shlex.join(["llama-server", "-m", str(file.resolve()), "--lora", lora])
            else:
                tl.export_peft(adapter, out)
    files = {path.name: path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    result = {
        "file": arguments.file,
        "base": file or base,
        "to": to,
        "folder": out,
        "parameters": adapter.num_parameters,
        "modules": len(adapter.names),
        "rank": adapter.config.rank,
        "merge": merge,
        "serve": serve,
        "note": note,
        "bytes": sum(files.values()),
        "files": files,
    }
    alone = ("serve", "note")  # a command is copied from one line
    words = shared.described({name: value for name, value in result.items() if name not in alone})
    lines = [f"serve it: {serve}"] if serve else []
    lines += [note] if note else []
    shared.show(arguments, result, words, *lines)


def _write_merged(
    model: PreTrainedModel,
    adapter: tl.TinyLoraAdapter,
    base: Path,
    out: Path,
    precision: Precision | None,
    progress: Progress,
) -> dict[str, Any]:
    """The base with the update inside, in place of the base in memory, which this process no longer needs."""
    from tinylora_lite.files.file_format import DTYPES

    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the base is quantized, and a merged weight would not be; export --to lora")
    dtype = DTYPES[precision] if precision else model.get_parameter(f"{adapter.names[0]}.weight").dtype
    progress.begin("measuring what the rounding takes")
    total = tl.merge_report(adapter, dtype).total
    progress.begin("merging", len(adapter.names))
    parameters = dict(model.named_parameters())
    merged = tl.merged_weights(adapter, dtype if precision else None)
    for done, (name, weight) in enumerate(merged, start=1):
        parameters[name].data = weight
        progress.advance(done, len(adapter.names))
    for parameter in parameters.values() if precision else ():
        parameter.data = parameter.data.to(dtype)
    progress.begin("writing")
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary)
        for source in (base / name for name in TOKENIZER_FILES):
            if source.is_dir():
                shutil.copytree(source, temporary / source.name)
            elif source.is_file():
                shutil.copy(source, temporary)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"dtype": str(dtype).removeprefix("torch."), "kept": total.kept, "cosine": total.cosine}


def _check_out(out: Path, to: str) -> None:
    """Raises ``FileExistsError`` before the base is loaded, where the export itself would do so in the end."""
    from tinylora_lite.files import gguf_lora
    from tinylora_lite.files.lora import SETTINGS
    from tinylora_lite.files.peft_format import check_free

    if to == "gguf-lora":
        gguf_lora.check_free(out)
    elif to != "merged":
        check_free(out, SETTINGS if to == "lora" else {"peft_type": "TINYLORA"})
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; name a new folder, or move that one")


def _serve(base: Path, out: Path, name: str, rank: int, is_nano: bool) -> str | None:
    """The command that serves the LoRA with vLLM; ``None`` where its rank is above what vLLM takes."""
    from tinylora_lite.sampling.vllm import RANKS, engine_settings

    if rank > RANKS[-1]:
        return None
    module = f"{name}={out.resolve()}"
    if "," in module or module.count("=") > 1:
        module = json.dumps({"name": name, "path": str(out.resolve())})
    command = ["vllm", "serve", str(base.resolve()), "--enable-lora", "--lora-modules", module]
    command += ["--max-lora-rank", str(engine_settings(base, rank)["max_lora_rank"])]
    command += ["--skip-tokenizer-init", "--dtype", "float32"] if is_nano else []  # the dtype of its training
    return shlex.join(command)
