"""What an adapter file is, and what a merge into its base would make of it."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tinylora_lite.cli import bases
from tinylora_lite.cli.describe import PEFT_TINYLORA, TINYLORA, describe
from tinylora_lite.files.file_format import DTYPES, Precision
from tinylora_lite.files.merge import MergeEffect, merge_report
from tinylora_lite.view.progress import PlainProgress

HELP = "say what an adapter file is, and what a merge would make of it"
EXAMPLE = "tinylora inspect tinylora-demo/calibrated.tinylora --base nano"
SEED_HELP = "taken by every command; nothing that is shown depends on it"

SHOWN = 64
"""So many numbers are written out; of more, the first ones and a summary."""
FIRST = 8

FLAGS = "lost: less than half of the update is kept; noisy: the cosine is below 0.9"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``tinylora inspect``."""
    bases.add_file_arguments(parser)
    parser.add_argument("--base", help=f"{bases.HELP}; shows whether it fits, and what a merge into it keeps")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the merged weights, with --base (default: bf16)")


def run(arguments: argparse.Namespace) -> None:
    """Prints what there is in words and, with a base, a table of the merge; or JSON."""
    if arguments.dtype and not arguments.base:
        raise ValueError("--dtype is of a merge; say into which base with --base")
    with bases.told_warnings():
        found = describe(arguments.file, arguments.basis)
        if arguments.base:
            if found["kind"] not in (TINYLORA, PEFT_TINYLORA):
                raise ValueError(f"{arguments.file} holds a {found['kind']} adapter; --base takes TinyLoRA adapters")
            folder = bases.base_folder(arguments.base)
            found |= _on_base(arguments.file, folder, arguments.basis, arguments.dtype or "bf16")
    if arguments.json:
        print(json.dumps(found))
        return
    if "vectors" not in found:
        print(_one_line(found))
        return
    console = Console()
    console.print(_words(found))
    if arguments.base:
        console.print(_table(found["merge"]))
        console.print(Text(_verdict(found["merge"])))


def _on_base(file: Path, folder: Path, basis: Path | None, dtype: Precision) -> dict[str, Any]:
    progress = PlainProgress()
    adapted = bases.load_adapted(file, folder, basis, progress)
    progress.begin(f"merging {len(adapted.adapter.names)} modules")
    report = merge_report(adapted.adapter, DTYPES[dtype])
    modules = {name: _effect(effect) for name, effect in report.modules.items()}
    return {
        "fits": True,  # or an error would have been raised
        "stored_factors": [name for name in adapted.adapter.names if name in adapted.adapter.given],
        "merge": {"base": str(folder), "dtype": dtype, "total": _effect(report.total), "modules": modules},
    }


def _effect(effect: MergeEffect) -> dict[str, Any]:
    values = {name: value if math.isfinite(value) else None for name, value in asdict(effect).items()}
    return values | {"flag": "lost" if effect.kept < 0.5 else "noisy" if effect.cosine < 0.9 else None}


def _words(found: dict[str, Any]) -> Table:
    """A line for each thing to know of a TinyLoRA."""
    table = Table.grid(padding=(0, 2, 0, 0))
    base = found["base"]
    checked = "; checksum verified" if "checksum" in found else ""
    rows = {
        "file": found["file"],
        "format": found.get("format", found["kind"]),
        "numbers": f"{found['parameters']:,}, {found['payload_bytes']:,} bytes as {found['dtype']}",
        "size": f"{found['bytes']:,} bytes, with what the numbers belong to{checked}",
        "settings": _settings(found["settings"]),
        "directions": _directions(found),
        "modules": _modules(found),
        "factors": _factors(found),
        "base": _base(base),
        "fingerprint": base.get("sha256"),
        "fits": found["merge"]["base"] if "merge" in found else None,
        "v": _vectors(found["vectors"]),
    }
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        if text:
            table.add_row(name, Text(text))
    return table


def _one_line(found: dict[str, Any]) -> str:
    count = "an unknown number of" if found["parameters"] is None else f"{found['parameters']:,}"
    return (
        f"{found['file']}: a {found['kind'].removeprefix('PEFT ')} adapter of PEFT ({_settings(found['settings'])}) "
        f"for {found['base']['name'] or 'a base without a name'}, {count} numbers, {found['bytes']:,} bytes"
    )


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in settings.items() if name != "projection")


def _modules(found: dict[str, Any]) -> str:
    groups, u = found["vectors"]["shape"]
    count = f"{found['modules']}" if found["modules"] else "as many as its target_modules name"
    return f"{count}, driven by {groups} vector{'s'[: groups > 1]} of {u} number{'s'[: u > 1]}"


def _directions(found: dict[str, Any]) -> str:
    settings, basis = found["settings"], found.get("basis")
    if found["kind"] == PEFT_TINYLORA:
        return "P in the folder" if settings["save_projection"] else "P left out, to be drawn again from its seed"
    if basis is not None:
        where = "found" if basis["found"] else "not found beside the file or in the package; give it with --basis"
        return f"calibrated basis {basis['fingerprint'][:12]}…, {where}"
    return f"random, seed {settings['seed']}" if settings["projection"] == "random" else "all of R (LoRA-XS)"


def _factors(found: dict[str, Any]) -> str:
    stored = found["stored_factors"]
    if not stored:
        return "computed from the base"
    if len(stored) == found["modules"]:
        return "stored, of all modules"
    return f"stored, of {len(stored)} modules ({_short(stored)}); computed from the base, of the others"


def _base(base: dict[str, Any]) -> str:
    parts = [base["name"] or "no name"]
    parts += [f"revision {base['revision']}"] if base["revision"] else []
    parts += [f"trained in {base['dtype']}"] if base.get("dtype") else []
    return ", ".join(parts)


def _vectors(vectors: dict[str, Any]) -> str:
    groups, u = vectors["shape"]
    summary = f"norm {vectors['norm']:.4g}, from {vectors['smallest']:.4g} to {vectors['largest']:.4g}"
    if groups * u > SHOWN or vectors["values"] is None:
        return summary
    lines = [[value for row in vectors["values"] for value in row]] if u == 1 else vectors["values"]
    return "\n".join([" ".join(f"{value:+.4g}" for value in line) for line in lines] + [summary])


def _table(merge: dict[str, Any]) -> Table:
    """A row for each module, and the whole update in the last."""
    table = Table(
        title=f"A merge in {merge['dtype']}", title_justify="left", caption=FLAGS, caption_justify="left",
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_footer=True,
    )  # fmt: skip
    total = merge["total"]
    table.add_column("module", "all", overflow="fold")
    for name in ("changed", "kept", "cosine", "size"):
        table.add_column(name, _number(total[name]), justify="right", no_wrap=True)
    table.add_column("flag", total["flag"] or "", no_wrap=True)
    for name, effect in merge["modules"].items():
        numbers = (_number(effect[column]) for column in ("changed", "kept", "cosine", "size"))
        table.add_row(name, *numbers, effect["flag"] or "")
    return table


def _verdict(merge: dict[str, Any]) -> str:
    flagged = sum(effect["flag"] is not None for effect in merge["modules"].values())
    if not flagged:
        return f"A merge in {merge['dtype']} keeps the update in all {len(merge['modules'])} modules."
    return (
        f"A merge in {merge['dtype']} spoils the update in {flagged} of {len(merge['modules'])} modules; "
        "tinylora export --to lora keeps all of it."
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > FIRST:
        return f"{', '.join(map(str, value[:FIRST]))}, … {len(value)} in all"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
