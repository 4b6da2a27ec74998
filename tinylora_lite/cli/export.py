"""Write an adapter in another form: a PEFT LoRA of the same function, PEFT's TinyLoRA, or a merged checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from tinylora_lite import nano
from tinylora_lite.cli import bases
from tinylora_lite.files.file_format import DTYPES, Precision
from tinylora_lite.files.lora import SETTINGS, export_lora
from tinylora_lite.files.merge import merge_report, merged_weights
from tinylora_lite.files.peft import export_peft
from tinylora_lite.files.peft_format import check_free
from tinylora_lite.utils.progress import progress_bar
from tinylora_lite.view.progress import PlainProgress, Progress

HELP = "write an adapter as a PEFT LoRA, as PEFT's TinyLoRA, or as a merged checkpoint"
EXAMPLE = "tinylora export tinylora-demo/calibrated.tinylora --base nano --to lora --out calibrated-lora"
SEED_HELP = "taken by every command; nothing that is written depends on it"

TOKENIZER_FILES = (
    "added_tokens.json",
    "additional_chat_templates",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Copied as they are: a tokenizer that is loaded and saved again is not always the same."""

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` of vLLM takes, from its default upwards."""


KINDS = {"lora": "a PEFT LoRA", "peft": "a PEFT TinyLoRA", "merged": "a checkpoint that needs no adapter"}

NANO_NOTES = {
    "lora": "vLLM does not serve the nano base from where it is: it takes the basis beside it for weights",
    "merged": "load the tokenizer with transformers.PreTrainedTokenizerFast: AutoTokenizer would take Qwen2's own",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora export``."""
    bases.add_file_arguments(parser)
    parser.add_argument("--base", required=True, help=bases.HELP)
    parser.add_argument(
        "--to",
        required=True,
        choices=("lora", "peft", "merged"),
        help="a PEFT LoRA (for PEFT, vLLM and llama.cpp), PEFT's TinyLoRA, or a checkpoint with the update inside",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where it goes")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of lora (default: fp32) or merged (default: that of the training)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prints what was written and, of a LoRA, how vLLM serves it; or JSON."""
    if arguments.dtype and arguments.to == "peft":
        raise ValueError("--dtype is of lora and merged; PEFT's TinyLoRA is float32")
    _check_out(arguments.out, arguments.to)
    base = bases.base_folder(arguments.base)
    progress = PlainProgress()
    with bases.told_warnings() as warnings:
        adapted = bases.load_adapted(arguments.file, base, arguments.basis, progress)
        result = _export(adapted, base, arguments, progress)
    result["warnings"] = warnings
    print(json.dumps(result) if arguments.json else _words(result))


def _export(adapted: bases.Adapted, base: Path, arguments: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    adapter, to, out = adapted.adapter, arguments.to, arguments.out
    is_nano = base.resolve() == (nano.CHECKPOINTS / nano.BASE).resolve()
    result = {
        "file": str(arguments.file),
        "base": str(base),
        "to": to,
        "folder": str(out),
        "parameters": adapter.num_parameters,
        "modules": len(adapter.names),
        "rank": adapter.config.rank,
        "merge": None,
        "serve": None,
        "note": NANO_NOTES.get(to) if is_nano else None,
    }
    if to == "merged":
        result["merge"] = _write_merged(adapted, base, out, arguments.dtype, progress)
    else:
        progress.begin("writing")
        if to == "lora":
            export_lora(adapter, out, arguments.dtype or "fp32")
            if not is_nano:
                result["serve"] = _serve(base, out, arguments.file.stem, adapter.config.rank)
        else:
            export_peft(adapter, out)
    files = {path.name: path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    return result | {"bytes": sum(files.values()), "files": files}


def _write_merged(
    adapted: bases.Adapted, base: Path, out: Path, precision: Precision | None, progress: Progress
) -> dict[str, Any]:
    """The base with the update inside, in place of the base in memory: this process needs the base no more."""
    model, adapter = adapted
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the base is quantized, and a merged weight would not be; export --to lora")
    dtype = DTYPES[precision] if precision else model.get_parameter(f"{adapter.names[0]}.weight").dtype
    progress.begin("weighing what the rounding takes")
    total = merge_report(adapter, dtype).total
    progress.begin("merging")
    parameters = dict(model.named_parameters())
    with progress_bar("merging", len(adapter.names)) as advance:
        for name, weight in merged_weights(adapter, dtype if precision else None):
            parameters[name].data = weight
            advance(name)
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
    if to != "merged":
        check_free(out, SETTINGS if to == "lora" else {"peft_type": "TINYLORA"})
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; name a new folder, or move that one")


def _serve(base: Path, out: Path, name: str, rank: int) -> str | None:
    """The command that serves the LoRA with vLLM; ``None`` where its rank is above what vLLM takes."""
    if rank > VLLM_RANKS[-1]:
        return None
    module = f"{name}={out.resolve()}"
    if "," in module or "=" in name:
        module = json.dumps({"name": name, "path": str(out.resolve())})
    command = ["vllm", "serve", str(base.resolve()), "--enable-lora", "--lora-modules", module]
    if rank > VLLM_RANKS[0]:
        command += ["--max-lora-rank", str(next(allowed for allowed in VLLM_RANKS if allowed >= rank))]
    return shlex.join(command)


def _words(result: dict[str, Any]) -> str:
    lines = [
        f"{result['folder']}: {KINDS[result['to']]}, {result['parameters']:,} numbers on {result['modules']} modules, "
        f"{result['bytes']:,} bytes"
    ]
    lines += [f"  {name}: {size:,} bytes" for name, size in result["files"].items()]
    if result["to"] == "merged":
        merge = result["merge"]
        lines.append(
            f"merged in {merge['dtype']}: {merge['kept']:.1%} of the update kept along itself, "
            f"at a cosine of {merge['cosine']:.3f} (1 is no rounding noise)"
        )
    if result["serve"]:
        lines.append(f"serve it: {result['serve']}")
    if result["note"]:
        lines.append(result["note"])
    return "\n".join(lines)
